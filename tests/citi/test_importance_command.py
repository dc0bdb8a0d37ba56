"""`citi importance`: its files, its options, what it refuses, and how it goes on after a kill."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from importance_command_cases import SUFFIXES, Folder, contents, saved
from test_command_line import citi
from two_processes import torchrun

from citi.base_model import DTYPES, load_base
from citi.command_line import importance as command
from citi.command_line.progress import Watcher
from citi.importance import ESTIMATORS, GRANULARITIES, progress_file
from citi.importance.ability_scores import AbilityScores
from citi.importance.score_components import score_components


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("importance command"))


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than scoring a tiny model."""
    monkeypatch.setattr(AbilityScores, "plot", lambda scores, path: None)


def test_it_writes_what_the_python_call_gives(folder: Folder, tmp_path: Path) -> None:
    output = tmp_path / "a folder" / "wichtig ü 重要"
    result = citi(*folder.words(output))
    assert result.exit_code == 0, result.output
    assert contents(output) == saved(folder.scores(), tmp_path)
    assert AbilityScores.load(output) == folder.scores()
    assert {path.name for path in output.parent.iterdir()} == {output.name + s for s in SUFFIXES}
    assert output.with_name(output.name + ".png").read_bytes().startswith(b"\x89PNG")
    for suffix in SUFFIXES:
        assert f"{output}{suffix}" in result.stdout


def test_more_samples_than_the_default_are_scored_if_asked_for(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_picture: None
) -> None:
    monkeypatch.setitem(score_components.__kwdefaults__, "max_samples", 3)
    citi(*folder.words(tmp_path / "x"))
    assert AbilityScores.load(tmp_path / "x").tool.num_samples == 9


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_estimator_and_granularity(
    folder: Folder, tmp_path: Path, estimator: str, granularity: str
) -> None:
    options = ["--estimator", estimator, "--granularity", granularity, "--batch-size", "2"]
    result = citi(*folder.words(tmp_path / "x", *options, general=["math"]))
    assert result.exit_code == 0, result.output
    kind = {"estimator": estimator, "granularity": granularity, "batch_size": 2}
    assert contents(tmp_path / "x") == saved(folder.scores(general=["math"], **kind), tmp_path)
    assert (tmp_path / "x.png").stat().st_size > 1000
    why = "at least 8 scored batches, got 5"
    assert ("got elements" if granularity == "element" else why) in result.stdout


@pytest.mark.parametrize(
    ("options", "given"),
    [
        (["--element-dtype", "bf16"], {"element_dtype": torch.bfloat16}),
        (["--seed", "5", "--samples", "4"], {"seed": 5, "max_samples": 4}),
        (["--max-length", "24"], {"max_length": 24}),
        (["--device-map", "cpu"], {}),
        (["--device-map", "auto"], {}),
        (["--checkpointing"], {}),
    ],
)
def test_options_reach_the_scoring(
    folder: Folder, tmp_path: Path, no_picture: None, options: list[str], given: dict
) -> None:
    kind = {"granularity": "element"} if "--element-dtype" in options else {}
    words = [word for pair in kind.items() for word in (f"--{pair[0]}", pair[1])]
    result = citi(*folder.words(tmp_path / "x", *words, *options))
    assert result.exit_code == 0, result.output
    assert contents(tmp_path / "x") == saved(folder.scores(**kind, **given), tmp_path)


def test_checkpointing_is_non_reentrant_and_on(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_picture: None
) -> None:
    seen = []
    original = torch.utils.checkpoint.checkpoint

    def checkpoint(*args, use_reentrant, **kwargs):
        seen.append(use_reentrant)
        return original(*args, use_reentrant=use_reentrant, **kwargs)

    monkeypatch.setattr("citi.importance.instrumented_model.checkpoint", checkpoint)
    citi(*folder.words(tmp_path / "x", "--samples", "2", general=[]))
    assert seen == []
    citi(*folder.words(tmp_path / "x", "--samples", "2", "--checkpointing", general=[]))
    assert seen == [False] * 6, "three layers, two samples"


def test_choices_of_the_help_are_those_of_the_package() -> None:
    assert tuple(command.Estimator) == ESTIMATORS
    assert tuple(command.Granularity) == GRANULARITIES
    assert set(command.Dtype) == {"auto", *DTYPES}
    assert set(command.ElementDtype) <= set(DTYPES)


class TestResume:
    def test_case_60_ctrl_c_says_how_to_resume_and_the_same_command_does(
        self, folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_picture: None
    ) -> None:
        output = tmp_path / "x y"
        words = folder.words(output, "--estimator", "batch", "--granularity", "row")
        original, calls = Watcher.progress, []

        def progress(watcher: Watcher, done: int, total: int, note: str = "") -> None:
            original(watcher, done, total, note)
            calls.append((note.split(":")[0], done))
            if calls[-1] == ("math", 3):
                raise KeyboardInterrupt

        monkeypatch.setattr(Watcher, "progress", progress)
        result = citi(*words)
        assert result.exit_code == 130
        model, data = folder.model, folder.data
        assert result.output.splitlines()[-1] == (
            f"interrupted. To resume: citi importance '{model}' --tool '{data['tool']}' "
            f"--general '{data['math']}' --general '{data['chat']}' --estimator batch "
            f"--granularity row --samples 9 --dtype fp32 --output '{output}'"
        )
        assert [path.name for path in tmp_path.iterdir()] == ["x y.progress"]
        calls.clear()
        again = citi(*words)
        assert again.exit_code == 0, again.output
        assert again.stdout.splitlines()[0] == (
            f"going on from {output}.progress; batches done: tool 9, math 3, chat 0"
        )
        assert calls[0] == ("math", 4)
        kind = {"estimator": "batch", "granularity": "row"}
        assert contents(output) == saved(folder.scores(**kind), tmp_path)
        assert not output.with_name("x y.progress").exists()

    def test_the_resume_line_is_the_command(
        self, folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def press(*args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("citi.base_model.load_base", press)
        options = ["--checkpointing", "--device-map", "auto", "--seed", "4", "--batch-size", "2"]
        options += ["--max-length", "100", "--granularity", "element", "--element-dtype", "bf16"]
        result = citi(*folder.words(tmp_path / "x", *options, general=[]))
        line = result.output.splitlines()[-1].partition("To resume: citi ")[2]
        words = shlex.split(line)
        assert sorted(words) == sorted(map(str, folder.words(tmp_path / "x", *options, general=[])))
        assert citi(*words).output.splitlines()[-1] == result.output.splitlines()[-1]

    def test_case_46_a_killed_scoring_goes_on_to_equal_files(
        self, folder: Folder, tmp_path: Path
    ) -> None:
        words = [str(word) for word in folder.words(tmp_path / "x", "--granularity", "head")]
        code = (
            "import os, signal, sys\n"
            "import citi.importance.progress_file as progress_file\n"
            "from citi.command_line import app\n"
            "from citi.command_line.progress import Watcher\n"
            "progress_file.SECONDS_BETWEEN_SAVES = 0.0\n"
            "def progress(watcher, done, total, note=''):\n"
            "    if note.startswith('math') and done == 5:\n"
            "        os.kill(os.getpid(), signal.SIGKILL)\n"
            "Watcher.progress = progress\n"
            "app(sys.argv[1:])\n"
        )
        command = [sys.executable, "-c", code, *words]
        killed = subprocess.run(command, check=False, timeout=120, env=dict(os.environ))
        assert killed.returncode == -signal.SIGKILL
        assert progress_file.batches_done(tmp_path / "x.progress") == {
            "tool": 9,
            "math": 5,
            "chat": 0,
        }
        result = citi(*words)
        assert result.exit_code == 0, result.output
        assert contents(tmp_path / "x") == saved(folder.scores(granularity="head"), tmp_path)

    def test_the_progress_of_another_scoring_is_refused(
        self, folder: Folder, tmp_path: Path, no_picture: None
    ) -> None:
        model, tokenizer = load_base(str(folder.model), dtype="fp32")
        score_components(
            model,
            tokenizer,
            tool=folder.data["tool"],
            general=[],
            max_samples=9,
            batch_size=2,
            progress_file=tmp_path / "x.progress",
        )
        result = citi(*folder.words(tmp_path / "x", general=[]))
        assert result.exit_code == 1
        assert "x.progress holds the progress of another scoring" in result.stderr
        assert "it differs in batch_size; remove it" in result.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["x.progress"]

    def test_a_damaged_progress_file_is_refused_before_the_model_is_loaded(
        self, folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("citi.base_model.load_base", lambda *a, **k: pytest.fail("loaded"))
        (tmp_path / "x.progress").write_text("not ours")
        result = citi(*folder.words(tmp_path / "x"))
        assert result.exit_code == 1
        assert "x.progress is no safetensors file of ours" in result.stderr


class TestRefused:
    @pytest.fixture(autouse=True)
    def _nothing_is_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("citi.base_model.load_base", lambda *a, **k: pytest.fail("loaded"))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--estimator", "fisher"], "'token', 'batch', 'parameter'"),
            (["--granularity", "layer"], "'component', 'row', 'column', 'head', 'element'"),
            (["--dtype", "int8"], "'auto', 'fp32', 'bf16', 'fp16'"),
            (["--samples", "0"], "--samples"),
            (["--element-dtype", "bf16"], "--element-dtype needs --granularity element"),
            (["--output", "runs/.."], "--output must end in a file name"),
        ],
    )
    def test_wrong_usage_ends_with_2(
        self, folder: Folder, tmp_path: Path, options: list[str], message: str
    ) -> None:
        result = citi(*folder.words(tmp_path / "x", *options))
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.replace("│", " ").split())

    def test_no_tool_data_is_wrong_usage(self, folder: Folder) -> None:
        assert citi("importance", folder.model).exit_code == 2

    def test_case_55_an_output_that_cannot_be_written_is_refused_before_loading(
        self, folder: Folder, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("")
        result = citi(*folder.words(tmp_path / "file" / "x"))
        assert result.exit_code == 1
        assert f"cannot write {tmp_path / 'file' / 'x.json'}: a part of the path is a file" in (
            result.stderr
        )
        (tmp_path / "x.safetensors").mkdir()
        result = citi(*folder.words(tmp_path / "x"))
        assert result.exit_code == 1
        assert "x.safetensors: a directory of that name is in the way" in result.stderr
        assert {path.name for path in tmp_path.iterdir()} == {"file", "x.safetensors"}

    def test_case_55_a_folder_without_permission_is_named(
        self, folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import builtins

        original = builtins.open

        def refuse(file: object, mode: str = "r", *args: object, **kwargs: object) -> object:
            if "x" in mode or "w" in mode:
                raise PermissionError(13, "Permission denied")
            return original(file, mode, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(builtins, "open", refuse)
            result = citi(*folder.words(tmp_path / "x"))
        assert result.exit_code == 1
        assert "x.json: permission denied; choose a directory that you may write" in result.stderr

    def test_data_are_looked_at_before_the_model_is_loaded(
        self, folder: Folder, tmp_path: Path
    ) -> None:
        words = folder.words(tmp_path / "x")
        result = citi(*words, "--general", tmp_path / "gone.jsonl")
        assert result.exit_code == 1
        assert f"no such data file: {tmp_path / 'gone.jsonl'}" in result.stderr
        (tmp_path / "broken.jsonl").write_text('{"messages": \n')
        result = citi(*words, "--general", tmp_path / "broken.jsonl")
        assert result.exit_code == 1
        assert f"{tmp_path / 'broken.jsonl'}:1" in result.stderr
        result = citi(*words, "--general", folder.data["math"])
        assert result.exit_code == 1
        assert "general must name every ability once" in result.stderr


def test_an_unknown_model_or_device_is_named(folder: Folder, tmp_path: Path) -> None:
    words = folder.words(tmp_path / "x")
    result = citi(*[str(tmp_path / "nowhere") if w == folder.model else w for w in words])
    assert result.exit_code == 1
    assert f"model: no such directory: {tmp_path / 'nowhere'}" in result.stderr
    result = citi(*words, "--device-map", "gpu7")
    assert result.exit_code == 1
    assert "device_map must be one of auto, balanced" in result.stderr
    assert "got 'gpu7'" in result.stderr


def test_no_memory_left_names_the_options_of_this_command(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **keywords: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("citi.importance.score_components.score_components", full)
    result = citi(*folder.words(tmp_path / "x"))
    assert result.exit_code == 1
    assert "Tried to allocate 2 GiB); lower --batch-size or --max-length" in result.stderr


def test_without_matplotlib_a_line_says_what_is_missing(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = citi(*folder.words(tmp_path / "x"))
    assert result.exit_code == 0, result.output
    assert "x.png: plotting needs matplotlib: pip install 'citi-kernels[report]'" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"x.json", "x.safetensors"}
    assert json.loads((tmp_path / "x.json").read_text())["estimator"] == "token"


def test_processes_share_the_batches_and_the_first_one_writes_and_prints(
    folder: Folder, tmp_path: Path
) -> None:
    output, logs = tmp_path / "scores", tmp_path / "logs"
    words = folder.words(output / "x", general=["math"])
    torchrun("--redirects=1", f"--log-dir={logs}", "-m", "citi", *words)
    said = [next(logs.glob(f"*/attempt_0/{rank}/stdout.log")).read_text() for rank in range(2)]
    assert "  tool: " in said[0]
    assert " 5/5" in said[0], "five of nine batches are the first one's"
    assert said[1] == ""
    assert {path.name for path in output.iterdir()} == {f"x{suffix}" for suffix in SUFFIXES}
    together, alone = AbilityScores.load(output / "x"), folder.scores(general=["math"])
    for name, ability in alone.abilities.items():
        got = together.abilities[name]
        assert (got.num_samples, got.num_tokens) == (ability.num_samples, ability.num_tokens)
        assert got.scores == pytest.approx(ability.scores, rel=1e-12)
