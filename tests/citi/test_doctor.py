"""`citi doctor`: versions, the machine, backends and why, and what is broken."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner, Result

from citi import processes
from citi.command_line import app
from citi.command_line import doctor as doctor_module
from citi_kernels import backends, compiled


def doctor() -> Result:
    return CliRunner().invoke(app, ["doctor"], catch_exceptions=False)


def _hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real = doctor_module._version
    monkeypatch.setattr(
        doctor_module, "_version", lambda name: None if name == package else real(name)
    )


def test_it_shows_versions_the_machine_and_the_backend_of_each_op() -> None:
    result = doctor()
    assert result.exit_code == 0, result.output
    for name in ("torch", "transformers", "peft", "citi-kernels"):
        assert importlib.metadata.version(name) in result.stdout
    words = " ".join(result.stdout.split())
    device = doctor_module._device()
    taken = "triton"
    if device == "cpu":
        taken = "torch" if compiled.why_missing("native") else "native"
    assert f"Backends, for {device} tensors: the fastest that runs here" in words
    assert f"citi::molora_linear {taken} " in words
    assert "Everything that is needed works." in result.stdout


def test_it_says_what_was_compiled_and_which_of_it_runs() -> None:
    words = " ".join(doctor().stdout.split())
    assert f"citi_kernels._C {compiled.description()}" in words


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ({"avx2": True}, "dtype auto fp32; bf16 only where hardware multiplies it"),
        ({"avx2": True, "avx512_bf16": True}, "dtype auto bf16 "),
        ({"amx_bf16": True}, "dtype auto bf16 "),
    ],
)
def test_it_says_which_dtype_auto_takes_on_this_cpu(
    monkeypatch: pytest.MonkeyPatch, features: dict[str, bool], words: str
) -> None:
    on_cpu = SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr(processes, "this_process", lambda: on_cpu)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert words in " ".join(doctor().stdout.split())


def test_without_the_extension_it_says_so_and_nothing_is_broken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled, "_load", lambda: (None, "nothing was compiled"))
    without = {
        op: {name: entry for name, entry in entries.items() if name not in ("native", "cuda")}
        for op, entries in backends._registry.items()
    }
    monkeypatch.setattr(backends, "_registry", without)
    result = doctor()
    assert result.exit_code == 0
    assert "citi_kernels._C not in use: nothing was compiled" in " ".join(result.stdout.split())


def test_it_says_how_triton_computes_the_product_with_the_frozen_weight() -> None:
    pytest.importorskip("triton")
    words = doctor_module._base_product("a GPU that nobody has measured")
    assert words.startswith("Product with the frozen weight: 0 shapes and directions measured")
    assert "for any other, cuBLAS and an update in place" in words


def test_a_missing_extra_is_no_failure_and_comes_with_its_pip_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _hide(monkeypatch, "rouge-score")
    result = doctor()
    assert result.exit_code == 0
    words = " ".join(result.stdout.split())
    assert "rouge-score missing ROUGE-L of responses: pip install 'citi-kernels[eval]'" in words


def test_a_missing_dependency_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    _hide(monkeypatch, "peft")
    result = doctor()
    assert result.exit_code == 1
    assert "broken: peft is missing: pip install citi-kernels" in result.stderr


def test_a_version_below_the_minimum_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.1" if name == "peft" else real(name)
    )
    result = doctor()
    assert result.exit_code == 1
    assert "broken: peft 0.1 is older than" in result.stderr


def test_a_backend_with_wrong_results_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    import citi_kernels

    right = citi_kernels.molora_linear

    def wrong(*arguments: object, **keywords: object) -> tuple:
        y, gate_sums = right(*arguments, **keywords)
        return 1.01 * y, gate_sums

    monkeypatch.setattr(citi_kernels, "molora_linear", wrong)
    result = doctor()
    assert result.exit_code == 1
    assert "broken: citi::molora_linear in torch.float32: y" in result.stderr
