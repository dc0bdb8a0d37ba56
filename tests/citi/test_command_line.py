"""The command line: what each command says, and with which exit code it ends."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from run_cases import write_data, write_model
from typer.testing import CliRunner, Result

from citi.command_line import app
from citi.command_line.progress import Watcher
from citi.recipe import load_recipe
from tiny import tiny_tokenizer

COMMANDS = ("doctor", "demo", "init", "data", "importance", "train", "eval", "chat", "report")
TINY = {
    "dtype": "fp32",
    "importance_samples": 2,
    "num_experts": 2,
    "r": 2,
    "batch_size": 3,
    "gradient_accumulation": 1,
    "max_length": 96,
    "epochs_mi": 1.0,
    "eval_batch_size": 4,
    "max_new_tokens": 4,
}


def citi(*words: str | Path, stdin: str | None = None) -> Result:
    """Run a command line as a user would; exceptions that are not handled are raised."""
    return CliRunner().invoke(
        app, [str(word) for word in words], input=stdin, catch_exceptions=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data and a recipe with evaluation data."""
    folder = tmp_path_factory.mktemp("command line")
    write_model(folder / "model")
    files = {name: str(path) for name, path in write_data(folder / "data").items()}
    general = {name: files[name] for name in ("math", "chat")}
    recipe = TINY | {
        "model": str(folder / "model"),
        "tool": {"calls": files["tool"]},
        "general": general,
        "eval_tool": {"calls": files["tool"]},
        "eval_general": general,
        "output": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[Path, Result]:
    """The run directory of a whole tiny run, and what `citi train` said."""
    return folder / "run", citi("train", folder / "recipe.yaml")


def test_help_names_every_command() -> None:
    result = citi("--help")
    assert result.exit_code == 0
    assert all(f" {name} " in result.stdout for name in COMMANDS)


def test_python_m_citi_is_citi() -> None:
    command = [sys.executable, "-m", "citi", "report", "nowhere"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: run directory: want an existing directory, got nowhere")


def test_wrong_usage_ends_with_2() -> None:
    assert citi("train").exit_code == 2
    assert citi("no-such-command").exit_code == 2


class TestErrors:
    def test_an_unknown_recipe_key_gets_a_suggestion_on_stderr(self, folder: Path) -> None:
        result = citi("train", folder / "recipe.yaml", "batch_sice=3")
        assert result.exit_code == 1
        assert result.stderr.splitlines()[0] == (
            "error: unknown key 'batch_sice'; did you mean batch_size?"
        )
        assert "Traceback" not in result.output

    def test_a_missing_recipe_is_named(self, tmp_path: Path) -> None:
        result = citi("train", tmp_path / "none.yaml")
        assert result.exit_code == 1
        assert "none.yaml" in result.stderr.splitlines()[0]

    def test_debug_raises_the_users_error_with_its_traceback(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="batch_sice"):
            citi("--debug", "train", folder / "recipe.yaml", "batch_sice=3")

    def test_our_own_mistakes_keep_their_traceback(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*arguments: object, **keywords: object) -> None:
            raise KeyError("a bug")

        monkeypatch.setattr("citi.run.train", broken)
        with pytest.raises(KeyError, match="a bug"):
            citi("train", folder / "recipe.yaml")

    def test_a_missing_extra_is_an_error_line_with_the_pip_line(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        result = citi("report", folder)
        assert result.exit_code == 1
        assert "pip install 'citi-kernels[report]'" in result.stderr

    def test_no_memory_left_names_the_keys_to_lower(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import torch

        def full(*arguments: object, **keywords: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

        monkeypatch.setattr("citi.run.train", full)
        result = citi("train", folder / "recipe.yaml")
        assert result.exit_code == 1
        assert "lower batch_size" in result.stderr

    def test_case_44_a_stage_that_stops_itself_is_one_line(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from citi.trainer import NonFiniteLossError

        def stop(*arguments: object, **keywords: object) -> None:
            raise NonFiniteLossError("stage mi, step 3: the loss is not finite")

        monkeypatch.setattr("citi.run.train", stop)
        result = citi("train", folder / "recipe.yaml")
        assert result.exit_code == 1
        assert result.stderr.startswith("error: stage mi, step 3: the loss is not finite")


class TestInterrupt:
    @pytest.fixture(autouse=True)
    def _interrupted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*arguments: object, **keywords: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("citi.run.train", interrupted)
        monkeypatch.setattr("citi.report.build_report", interrupted)

    def test_case_60_ctrl_c_in_train_ends_with_130_and_says_how_to_resume(
        self, folder: Path
    ) -> None:
        recipe = folder / "recipe.yaml"
        result = citi("train", recipe, "seed=3")
        assert result.exit_code == 130
        assert result.output.splitlines()[-1] == (
            f"interrupted. To resume: citi train '{recipe}' seed=3"
        )

    def test_case_60_ctrl_c_elsewhere_says_so_too(self, folder: Path) -> None:
        result = citi("report", folder)
        assert result.exit_code == 130
        assert result.output.splitlines()[-1] == "interrupted. Run the same command again."


class TestInit:
    def test_it_writes_a_recipe_that_loads_with_paths_beside_it(
        self, folder: Path, tmp_path: Path
    ) -> None:
        recipe = tmp_path / "my recipes" / "first.yaml"
        data = folder / "data"
        result = citi(
            "init", recipe, "--model", folder / "model", "--tool", data / "tool.jsonl",
            "--general", data / "math.jsonl", "--general", data / "chat.jsonl",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert "citi train" in result.stdout
        loaded = load_recipe(recipe)
        assert loaded.model == str(folder / "model")
        assert Path(loaded.tool["tool"]).samefile(data / "tool.jsonl")
        assert set(loaded.general) == {"math", "chat"}

    def test_an_existing_recipe_is_replaced_only_by_force(
        self, folder: Path, tmp_path: Path
    ) -> None:
        recipe = tmp_path / "first.yaml"
        recipe.write_text("mine")
        data = folder / "data"
        words = ["init", recipe, "--model", "m", "--tool", data / "tool.jsonl"]
        words += ["--general", data / "math.jsonl"]
        result = citi(*words)
        assert result.exit_code == 1
        assert "--force" in result.stderr
        assert recipe.read_text() == "mine"
        assert citi(*words, "--force").exit_code == 0
        assert "model: m" in recipe.read_text()

    def test_a_data_file_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        words = ["--model", "m", "--tool", "gone.jsonl", "--general", "g"]
        result = citi("init", tmp_path / "a.yaml", *words)
        assert result.exit_code == 1
        assert "gone.jsonl" in result.stderr
        assert not (tmp_path / "a.yaml").exists()


class TestDataCheck:
    def test_it_shows_formats_counts_and_a_sample_with_its_mask(self, folder: Path) -> None:
        result = citi("data", "check", folder / "recipe.yaml")
        assert result.exit_code == 0, result.output
        assert "OpenAI messages, 6 rows" in result.stdout
        assert "6 of 6 rows: 6 tool, 0 general" in result.stdout
        assert "Weather in Rome?<|im_end|>" in result.stdout
        assert "⟦API-Request: [Weather(city='Rome')]<|im_end|>⟧" in result.stdout

    def test_it_counts_what_max_length_cuts(self, folder: Path) -> None:
        result = citi("data", "check", folder / "recipe.yaml", "max_length=40")
        assert "6 of 6 at 40 tokens" in result.stdout

    def test_a_file_that_trains_nothing_ends_with_1(self, folder: Path, tmp_path: Path) -> None:
        silent = tmp_path / "silent.jsonl"
        silent.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
        result = citi("data", "check", folder / "recipe.yaml", f"tool={silent}")
        assert result.exit_code == 1
        assert "no sample can be trained on in tool.silent" in result.stderr
        assert "no assistant turn" in result.stdout

    def test_the_sample_shown_is_one_that_is_trained_on(self, folder: Path, tmp_path: Path) -> None:
        row = '{"messages": [{"role": "user", "content": "REFUSED"}, '
        row += '{"role": "assistant", "content": "no"}]}\n'
        data = tmp_path / "data.jsonl"
        data.write_text(row + row.replace("REFUSED", "hello").replace("no", "taken"))
        model = tmp_path / "model"
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template += (
            "{% if 'REFUSED' in messages[0].content %}{{ raise_exception('not this') }}{% endif %}"
        )
        tokenizer.save_pretrained(model)
        result = citi("data", "check", folder / "recipe.yaml", f"model={model}", f"tool={data}")
        assert result.exit_code == 0, result.output
        assert "1 samples: the chat template refuses" in result.stdout
        assert "⟦taken<|im_end|>⟧" in result.stdout

    def test_a_broken_line_is_named_by_file_and_line(self, folder: Path, tmp_path: Path) -> None:
        broken = tmp_path / "broken.jsonl"
        broken.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
        result = citi("data", "check", folder / "recipe.yaml", f"tool={broken}")
        assert result.exit_code == 1
        assert f"{broken}:2" in result.stderr


class TestRun:
    def test_train_leaves_a_run_and_shows_the_table(self, trained: tuple[Path, Result]) -> None:
        run, result = trained
        assert result.exit_code == 0, result.output
        for name in ("manifest.json", "plan.json", "metrics.jsonl", "adapter", "report.html"):
            assert (run / name).exists(), name
        for words in ("router pre-training", "base", "tuned", "answer NLL", "report.html"):
            assert words in result.stdout, words

    def test_train_again_does_nothing_twice(
        self, folder: Path, trained: tuple[Path, Result]
    ) -> None:
        run, _ = trained
        before = (run / "metrics.jsonl").read_bytes()
        result = citi("train", folder / "recipe.yaml")
        assert result.exit_code == 0
        assert result.stdout.count("skipped") >= 6
        assert (run / "metrics.jsonl").read_bytes() == before

    def test_overrides_reach_the_run(self, trained: tuple[Path, Result], folder: Path) -> None:
        result = citi("train", folder / "recipe.yaml", "delta=0.5")
        assert result.exit_code == 1
        assert "delta" in result.stderr

    def test_eval_measures_again(self, trained: tuple[Path, Result]) -> None:
        run, _ = trained
        before = (run / "eval" / "base.json").read_bytes()
        (run / "eval" / "base.json").unlink()
        result = citi("eval", run)
        assert result.exit_code == 0, result.output
        assert "exact" in result.stdout
        assert (run / "eval" / "base.json").read_bytes() == before

    def test_eval_writes_the_report_again_where_matplotlib_is(
        self, trained: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run, _ = trained
        before = (run / "report.html").read_bytes()
        (run / "report.html").unlink()
        assert citi("eval", run).exit_code == 0
        assert (run / "report.html").read_bytes() == before
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        result = citi("eval", run)
        assert result.exit_code == 0
        assert "no new report" in result.stdout

    def test_report_is_written_again(self, trained: tuple[Path, Result]) -> None:
        run, _ = trained
        before = (run / "report.html").read_bytes()
        (run / "report.html").unlink()
        result = citi("report", run)
        assert result.exit_code == 0, result.output
        assert str(run / "report.html") in result.stdout
        assert (run / "report.html").read_bytes() == before

    def test_chat_answers_lines_until_quit(self, trained: tuple[Path, Result]) -> None:
        run, _ = trained
        words = ["--max-new-tokens", "2"]
        for choice in ([], ["--base"]):
            result = citi("chat", run, *words, *choice, stdin="hello\n/tools\n/quit\n")
            assert result.exit_code == 0, result.output
            assert "(no tools)" in result.stdout

    @pytest.mark.parametrize("command", ["eval", "chat"])
    def test_a_folder_that_is_no_run_is_refused(self, command: str, tmp_path: Path) -> None:
        result = citi(command, tmp_path)
        assert result.exit_code == 1
        assert "not a run directory" in result.stderr


class TestDemo:
    def test_its_options_reach_the_demo(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = []
        monkeypatch.setattr("citi.demo.run_demo", lambda **given: calls.append(given))
        result = citi("demo", "--quick", "--output", tmp_path / "demo")
        assert result.exit_code == 0, result.output
        assert calls[0]["quick"] is True
        assert calls[0]["output"] == tmp_path / "demo"

    def test_case_60_ctrl_c_says_how_to_resume(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(**given: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("citi.demo.run_demo", interrupted)
        result = citi("demo", "--quick", "--output", tmp_path)
        assert result.exit_code == 130
        assert result.output.splitlines()[-1] == (
            f"interrupted. To resume: citi demo --quick --output {tmp_path}"
        )


class TestWatcher:
    def _lines(self, capsys: pytest.CaptureFixture[str], *, seconds: float = 1e6) -> list[str]:
        with Watcher(Console(width=200), seconds_between_lines=seconds) as watcher:
            watcher.phase_started("mi", "MOLoRA improvement")
            for done in range(101):
                watcher.progress(done, 100, f"loss {1 / (done + 1):.2f}")
            watcher.phase_finished("mi", 61.0)
            watcher(4, 8, "base [tool]: answers")
            watcher(8, 8, "base [tool]: answers")
            watcher(8, 8, "tuned: answers")
        return capsys.readouterr().out.splitlines()

    def test_without_a_terminal_first_and_last_step_get_a_plain_line(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self._lines(capsys) == [
            "MOLoRA improvement …",
            "  MOLoRA improvement: loss 1.00 0/100",
            "  MOLoRA improvement: loss 0.01 100/100",
            "MOLoRA improvement: done in 1:01",
            "  base [tool]: answers 4/8",
            "  base [tool]: answers 8/8",
            "  tuned: answers 8/8",
        ]

    def test_lines_come_as_often_as_asked_for(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert len(self._lines(capsys, seconds=0.0)) == 106

    def test_on_a_terminal_bars_show_the_same_work(self) -> None:
        console = Console(force_terminal=True, width=120, file=io.StringIO(), record=True)
        with Watcher(console) as watcher:
            watcher.phase_started("rp", "router pre-training")
            watcher.progress(3, 6, "loss 2.10")
            watcher.line("a word in between")
            watcher.phase_skipped("uco", "unimportant components", "nothing to do")
            watcher.phase_finished("rp", 5.0)
        text = console.export_text()
        assert "router pre-training: done in 0:05" in text
        assert "unimportant components: skipped, nothing to do" in text
