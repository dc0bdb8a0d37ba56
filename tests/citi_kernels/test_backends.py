"""Choice of a backend: names, order, reasons."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from citi_kernels import (
    available_backends,
    backends,
    compiled,
    environment,
    molora_linear,
    use_backend,
)
from citi_kernels.testing import random_case

# what runs molora_linear on the CPU here, the fastest first
ON_THE_CPU = ("torch",) if compiled.why_missing("native") else ("native", "torch")
FASTEST = ON_THE_CPU[0]


@pytest.fixture
def an_op(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An op of this test alone."""
    monkeypatch.setattr(
        backends, "_registry", {name: dict(e) for name, e in backends._registry.items()}
    )
    return "an_op"


def test_names_are_those_of_the_design() -> None:
    assert backends.BACKENDS == ("reference", "torch", "native", "triton", "cuda")
    assert set(available_backends("molora_linear")) == {"reference", *ON_THE_CPU}
    # of all ops that were imported
    assert set(available_backends()) == {"reference", *ON_THE_CPU}


def test_without_a_choice_the_fastest_runs_and_never_the_reference() -> None:
    assert backends.choose("molora_linear", torch.ones(1)) == FASTEST


def test_use_backend_nests_and_restores_also_after_an_exception() -> None:
    x = torch.ones(1)
    with use_backend("reference"):
        with use_backend("torch"):
            assert backends.choose("molora_linear", x) == "torch"
        assert backends.choose("molora_linear", x) == "reference"
        with pytest.raises(KeyError), use_backend("torch"):
            raise KeyError
        assert backends.choose("molora_linear", x) == "reference"
        again = use_backend("torch")
        with again, again:
            assert backends.choose("molora_linear", x) == "torch"
    assert backends.choose("molora_linear", x) == FASTEST


def test_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(ValueError, match=r"want one of reference, torch, .*; got 'tritom'"):
        use_backend("tritom")


@pytest.mark.parametrize("name", ["native", "cuda"])
def test_a_backend_no_op_has_is_refused_with_the_reason(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = backends._registry["molora_linear"]
    only = {"molora_linear": {each: entries[each] for each in ("reference", "torch")}}
    monkeypatch.setattr(backends, "_registry", only)
    with pytest.raises(RuntimeError, match=f"no {name} implementation of citi::molora_linear"):
        use_backend(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_without_a_gpu_is_refused_with_the_reason() -> None:
    with pytest.raises(RuntimeError, match=r"triton is not installed|is_available\(\) is False"):
        use_backend("triton")


def test_triton_refuses_fp64_and_names_what_it_takes() -> None:
    refuses = backends._registry["molora_linear"]["triton"].refuses
    assert refuses(torch.ones(1, 1)) is refuses(torch.ones(1, 1).bfloat16()) is None
    assert "fp32, bf16 and fp16, got torch.float64" in refuses(torch.ones(1, 1).double())


def test_the_interpreter_lets_triton_run_on_the_cpu_but_only_when_asked() -> None:
    pytest.importorskip("triton")
    code = """
        import torch
        from citi_kernels import backends, use_backend

        x = torch.ones(2, 3)
        print(backends.choose("molora_linear", x), end=" ")
        with use_backend("triton"):
            print(backends.choose("molora_linear", x))
    """
    environ = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environ
    )
    assert result.stdout.strip() == f"{FASTEST} triton", result.stderr


@pytest.mark.skipif(FASTEST == "torch", reason="the extension is not built")
@pytest.mark.parametrize(("chosen", "taken"), [("", "torch"), ("portable", "native")])
def test_without_vector_instructions_torch_runs_unless_portable_kernels_are_asked_for(
    chosen: str, taken: str
) -> None:
    code = """
        import importlib
        import torch
        from citi_kernels import backends, compiled
        from citi_kernels.ops import importance_native, molora_linear_native
        from citi_kernels.ops.importance_row_dots import OP

        compiled.extension().cpu_features = ("portable",)
        for module in (importance_native, molora_linear_native):
            importlib.reload(module)
        x = torch.ones(1, 1)
        print(backends.choose("molora_linear", x), backends.choose(OP, x))
        print(backends._refusal(OP, "native", x))
    """
    environ = os.environ | {"CITI_CPU_FEATURES": chosen, "CITI_BACKEND": ""}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environ
    )
    choice, reason = result.stdout.splitlines()
    assert choice == f"{taken} {taken}", result.stderr
    assert ("the torch backend is faster" in reason) == (taken == "torch")


def test_explain_gives_every_backend_with_a_reason_where_it_cannot_run() -> None:
    lines = backends.explain("molora_linear")
    assert [line.backend for line in lines] == list(backends.BACKENDS)
    for line in lines:
        assert line.available == (line.backend in ("reference", *ON_THE_CPU))
        assert bool(line.reason) != line.available


def test_registering_twice_and_finding_nothing_raise(an_op: str) -> None:
    backends.register(an_op, "torch", SimpleNamespace())
    with pytest.raises(ValueError, match="citi::an_op already has a 'torch' implementation"):
        backends.register(an_op, "torch", SimpleNamespace())
    with pytest.raises(ValueError, match="citi::an_op has torch; got 'native'"):
        backends.find(an_op, "native")


def test_missing_parts_of_the_installation_are_named(
    an_op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled._load.cache_clear()
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    for name in ("torch", "native", "triton", "cuda"):
        backends.register(an_op, name, SimpleNamespace())
    reasons = {line.backend: line.reason for line in backends.explain(an_op)}
    assert reasons["torch"] == ""
    assert (
        reasons["native"] == reasons["cuda"] == "citi_kernels._C is not built in this installation"
    )
    assert "triton is not installed" in reasons["triton"]
    compiled._load.cache_clear()


def test_a_gpu_backend_needs_a_gpu_and_a_gpu_tensor(
    an_op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backends.register(an_op, "triton", SimpleNamespace())
    assert "is_available() is False" in backends.explain(an_op)[3].reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    backends.register("another", "triton", SimpleNamespace())
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match="it runs on cuda tensors, got cpu"),
    ):
        backends.choose("another", torch.ones(1))
    assert backends.choose("another", torch.ones(1)) == "torch"


def test_a_faster_backend_is_taken_where_it_takes_the_input(
    an_op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(x: torch.Tensor) -> str | None:
        return None if x.dtype == torch.float32 else f"it wants torch.float32, got {x.dtype}"

    monkeypatch.setattr(compiled, "why_missing", lambda name: None)
    backends.register(an_op, "torch", SimpleNamespace())
    backends.register(an_op, "native", SimpleNamespace(), refuses=refuses)
    assert backends.choose(an_op, torch.ones(1)) == "native"
    assert backends.choose(an_op, torch.ones(1).double()) == "torch"
    with (
        use_backend("native"),
        pytest.raises(RuntimeError, match=r"wants torch.float32, got torch"),
    ):
        backends.choose(an_op, torch.ones(1).double())


def test_environment_variable_chooses_and_use_backend_overrides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment, "BACKEND", "reference")
    assert backends.choose("molora_linear", torch.ones(1)) == "reference"
    with use_backend("torch"):
        assert backends.choose("molora_linear", torch.ones(1)) == "torch"


@pytest.mark.parametrize(
    ("name", "reason"),
    [("cuda", None), ("fast", "there is no such backend; want one of")],
)
def test_a_wrong_environment_variable_raises_at_the_call_not_at_import(
    name: str, reason: str | None
) -> None:
    if name in backends.BACKENDS:
        _, is_available, reason = backends.explain("molora_linear")[backends.BACKENDS.index(name)]
        if is_available:
            pytest.skip(f"{name} runs here")
    code = (
        "import citi_kernels as c; case = c.testing.random_case(2, 4, 4); print('imported')\n"
        "c.molora_linear(*case.operands, **case.options)"
    )
    environ = os.environ | {"CITI_BACKEND": name}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environ
    )
    assert result.stdout.strip() == "imported"
    assert f"RuntimeError: backend '{name}' cannot run citi::molora_linear: " in result.stderr
    assert reason in result.stderr


def test_choice_is_traced_and_guarded_by_compile() -> None:
    torch._dynamo.reset()
    case = random_case(4, 8, 6, num_segments=None)
    compiled = torch.compile(molora_linear, fullgraph=True, backend="aot_eager")
    calls = []
    for name in ("torch", "reference"):
        with use_backend(name):
            calls.append(compiled(*case.operands, **case.options)[0])
            expected = molora_linear(*case.operands, **case.options)[0]
        assert torch.equal(calls[-1], expected)


def test_what_is_known_to_be_faster_is_tried_first_but_only_where_it_runs() -> None:
    x = torch.ones(2, 2)
    assert backends.choose("molora_linear", x, first="torch") == "torch"
    assert backends.choose("molora_linear", x, first="cuda") == backends.choose("molora_linear", x)
    with use_backend("reference"):
        assert backends.choose("molora_linear", x, first="torch") == "reference"
