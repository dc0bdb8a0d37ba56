"""`citi_kernels._C` as Python sees it: what it refuses, and what does not change its results."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import fuzz_extension
import pytest
import torch
from torch import Tensor

from citi_kernels import compiled, environment
from citi_kernels.source_digest import source_digest

ROOT = Path(__file__).resolve().parents[2]
NUM_TOKENS, NUM_FEATURES, NUM_SEGMENTS = 6, 8, 4


@pytest.fixture
def variants(extension: ModuleType) -> Iterator[tuple[str, ...]]:
    yield extension.cpu_features
    extension.use_cpu_variant(environment.CPU_FEATURES)


def python(code: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | variables,
    )


def row_dots(extension: ModuleType, a: Tensor, b: Tensor, num_segments: int, num_threads: int = 1):
    scores = torch.zeros(num_segments, dtype=torch.float64)
    parts = torch.full((extension.row_dots_parts(*a.shape, num_segments), num_segments), torch.nan)
    parts = parts.double()
    extension.accumulate_row_dots(
        shape=tuple(a.shape),
        scores=compiled.vector(scores),
        a=compiled.matrix(a),
        b=compiled.matrix(b),
        valid=None,
        offset=None,
        is_signed=False,
        parts=compiled.vector(parts),
        num_threads=num_threads,
    )
    return scores


@pytest.mark.parametrize("num_segments", [1, 4, 120], ids=["component", "heads", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_neither_the_variant_nor_the_threads_change_a_bit(
    extension: ModuleType, variants: tuple[str, ...], dtype: torch.dtype, num_segments: int
) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 2500, 120).to(dtype).unbind()
    assert extension.row_dots_parts(2500, 120, num_segments) > 1
    expected = None
    for variant in variants:
        assert extension.use_cpu_variant(variant) == variant
        for num_threads in (1, 2, 5):
            scores = row_dots(extension, a, b, num_segments, num_threads)
            expected = scores if expected is None else expected
            assert torch.equal(scores, expected), (variant, num_threads)
    truth = (a.double() * b.double()).reshape(2500, num_segments, -1).sum(2).abs().sum(0)
    torch.testing.assert_close(expected, truth, rtol=1e-5, atol=0)


def test_it_says_what_it_is(extension: ModuleType) -> None:
    assert set(extension.built_with) == {"compiler", "flags", "openmp", "cuda", "cuda_archs"}
    assert "-O3" in extension.built_with["flags"] or os.name == "nt"
    assert extension.cpu_features[-1] == "portable"
    line = compiled.description()
    assert line.startswith(f"{extension.version}: {extension.use_cpu_variant('')} on this CPU; ")
    assert extension.built_with["compiler"] in line


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_pytorch_and_the_extension_share_one_openmp_runtime(extension: ModuleType) -> None:
    if not extension.built_with["openmp"]:
        pytest.skip("built without OpenMP")
    torch.ones(1 << 20).sum()
    mapped = Path("/proc/self/maps").read_text().split()
    runtimes = {Path(word).resolve() for word in mapped if "libgomp" in word or "libomp" in word}
    assert len(runtimes) == 1


def test_a_wrong_choice_of_features_is_said_at_the_call_not_at_import(
    extension: ModuleType,
) -> None:
    code = """
        import torch
        from citi_kernels import backends
        from citi_kernels.ops.importance_row_dots import OP
        print(backends.choose(OP, torch.ones(1, 1)), backends.explain(OP)[2].reason)
    """
    result = python(code, CITI_CPU_FEATURES="fast", CITI_BACKEND="")
    wanted = f"torch CITI_CPU_FEATURES: want one of {', '.join(extension.cpu_features)}; got 'fast'"
    assert result.stdout.strip() == wanted, result.stderr


@pytest.mark.parametrize("variant", ["portable", "avx2", "avx512"])
def test_the_environment_forces_a_variant(extension: ModuleType, variant: str) -> None:
    if variant not in extension.cpu_features:
        pytest.skip(f"this CPU or build has no {variant}")
    code = "from citi_kernels import compiled; print(compiled.description())"
    result = python(code, CITI_CPU_FEATURES=variant)
    assert f": {variant} on this CPU;" in result.stdout, result.stderr


def test_without_the_extension_the_torch_backend_is_taken() -> None:
    code = """
        import sys
        import torch

        class Hidden:
            def find_spec(self, name, path=None, target=None):
                if name == "citi_kernels._C":
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Hidden())
        from citi_kernels import backends, compiled
        from citi_kernels.ops.importance_row_dots import OP, accumulate_row_dots_

        scores = torch.zeros(2)
        accumulate_row_dots_(scores, torch.ones(3, 4), torch.ones(3, 4))
        print(backends.choose(OP, torch.ones(1, 1)), scores.tolist(), compiled.description())
    """
    result = python(code, CITI_BACKEND="", TRITON_INTERPRET="0")
    wanted = "torch [6.0, 6.0] not in use: citi_kernels._C is not built in this installation"
    assert result.stdout.strip() == wanted, result.stderr


def test_an_extension_of_other_sources_is_not_used_and_says_so(extension: ModuleType) -> None:
    """One of an older commit may lack what is asked of it."""
    assert extension.sources == source_digest(ROOT)
    code = """
        import sys, types
        sys.modules["citi_kernels._C"] = stale = types.ModuleType("citi_kernels._C")
        stale.__spec__ = types.SimpleNamespace()
        stale.version, stale.sources = "0.1.0", "0123456789abcdef"
        import torch
        from citi_kernels import backends, compiled
        import citi_kernels
        print(backends.choose("molora_linear", torch.ones(1, 1)), compiled.why_missing("native"))
    """
    result = python(code, CITI_BACKEND="", TRITON_INTERPRET="0")
    reason = "citi_kernels._C was built from other sources than these; pip install again"
    assert result.stdout.strip() == f"torch {reason}", result.stderr


def test_the_digest_follows_names_and_bytes_of_what_is_compiled(tmp_path: Path) -> None:
    assert source_digest(tmp_path) is None
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "extension_build.py").write_text("")
    digests = [source_digest(tmp_path)]
    for name, text in (("a.h", "1"), ("a.h", "2"), ("cpu/b.cpp", "2"), ("cpu/c.cu", "")):
        (tmp_path / "csrc" / name).write_text(text)
        digests.append(source_digest(tmp_path))
    assert len(set(digests)) == 5
    (tmp_path / "csrc" / "a.h").rename(tmp_path / "csrc" / "z.h")
    assert source_digest(tmp_path) not in digests
    (tmp_path / "csrc" / "z.h").rename(tmp_path / "csrc" / "a.h")
    (tmp_path / "csrc" / "notes.md").write_text("not compiled")
    assert source_digest(tmp_path) == digests[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_launch_without_a_driver_raises(cuda_extension: ModuleType) -> None:
    arguments = _arguments(cuda_extension, "cuda")
    with pytest.raises(RuntimeError, match=r"could not launch on CUDA: cudaError\w+, \w+"):
        cuda_extension.accumulate_row_dots_cuda(**arguments)


_KEPT: list[Tensor] = []


def _arguments(extension: ModuleType, backend: str) -> dict:
    """Valid ones, but for the memory where `backend` is "cuda"."""
    parts_of = extension.row_dots_parts if backend == "native" else extension.row_dots_cuda_parts
    num_parts = parts_of(NUM_TOKENS, NUM_FEATURES, NUM_SEGMENTS)
    tensors = {
        "scores": torch.zeros(NUM_SEGMENTS, dtype=torch.float64),
        "valid": torch.ones(NUM_TOKENS, dtype=torch.bool),
        "offset": torch.ones(NUM_FEATURES),
        "parts": torch.zeros(num_parts * NUM_SEGMENTS, dtype=torch.float64),
    }
    a, b = torch.ones(NUM_TOKENS, NUM_FEATURES), torch.ones(NUM_TOKENS, NUM_FEATURES)
    _KEPT[:] = [a, b, *tensors.values()]
    where = {"num_threads": 2} if backend == "native" else {"device": 0, "stream": 0}
    return {
        "shape": (NUM_TOKENS, NUM_FEATURES),
        "a": compiled.matrix(a),
        "b": compiled.matrix(b),
        "is_signed": False,
        **{name: compiled.vector(each) for name, each in tensors.items()},
        **where,
    }


def _changed(arguments: dict, name: str, entry: int | None, value: object) -> dict:
    if entry is None:
        return arguments | {name: value}
    numbers = list(arguments[name])
    numbers[entry] = value
    return arguments | {name: tuple(numbers)}


# name, entry of its tuple, value, error, message
WRONG = {
    "no token": ("shape", 0, 0, ValueError, "shape: sizes must be positive"),
    "too many tokens": ("shape", 0, 2**60, ValueError, "num_tokens"),
    "more tokens": ("shape", 0, 7, ValueError, "a: shape and strides must stay within the 192"),
    "too many features": ("shape", 1, 2**63 - 1, ValueError, "shape: sizes must be"),
    "features beyond int64": ("shape", 1, 2**63, TypeError, "incompatible function arguments"),
    "features of a float": ("shape", 1, 8.0, TypeError, "incompatible function arguments"),
    "a null": ("a", 0, 0, ValueError, "a: data must not be null"),
    "a negative address": ("a", 0, -8, TypeError, "incompatible function arguments"),
    "an address of a float": ("a", 0, 1e9, TypeError, "incompatible function arguments"),
    "an unknown dtype": ("a", 2, 9, ValueError, "a: dtype must be one of DTYPES, got 9"),
    "a of bool": ("a", 2, 4, ValueError, "a: dtype must be floating"),
    "a in fp64": ("a", 2, 3, ValueError, "a: shape and strides must stay within"),
    "a stride beyond": ("a", 3, 9, ValueError, "a: shape and strides must stay within"),
    "an enormous stride": ("b", 4, 2**63 - 1, ValueError, "b: shape and strides must stay"),
    "a negative stride": ("b", 3, -1, ValueError, "b: strides must not be negative"),
    "b a byte short": ("b", 1, 191, ValueError, "b: shape and strides must stay within the 191"),
    "no scores": ("scores", 3, 0, ValueError, "shape: sizes must be positive"),
    "three scores": ("scores", 3, 3, ValueError, "scores: must have a number of entries that"),
    "scores in bf16": ("scores", 2, 1, ValueError, "scores: dtype must be fp32 or fp64"),
    "scores too short": ("scores", 1, 31, ValueError, "scores: must stay within the 31 bytes"),
    "no valid": ("valid", 0, 0, ValueError, "valid: data must not be null"),
    "valid of floats": ("valid", 2, 0, ValueError, "valid: dtype must be bool"),
    "too few valid": ("valid", 3, 5, ValueError, "valid: must have 6 entries, got 5"),
    "offset in fp64": ("offset", 2, 3, ValueError, "offset: dtype must be that of the dots"),
    "a short offset": ("offset", 1, 31, ValueError, "offset: must stay within the 31 bytes"),
    "parts of another size": ("parts", 3, 8, ValueError, "parts: must have 4 entries, got 8"),
    "parts in fp32": ("parts", 2, 0, ValueError, "parts: dtype must be fp64"),
    "an integer for a bool": ("is_signed", None, 1, TypeError, "incompatible function arguments"),
    "nothing": ("a", None, None, TypeError, "incompatible function arguments"),
    "a tensor": ("a", None, torch.ones(6, 8), TypeError, "incompatible function arguments"),
}
WRONG_THREADS = {
    "no thread": ("num_threads", None, 0, ValueError, r"num_threads: must be in \[1, 4096\]"),
    "threads without end": ("num_threads", None, 2**40, ValueError, "num_threads: must be in"),
}


@pytest.mark.parametrize("case", (WRONG | WRONG_THREADS).values(), ids=WRONG | WRONG_THREADS)
def test_wrong_numbers_are_named_by_the_cpu_kernels(extension: ModuleType, case: tuple) -> None:
    name, entry, value, error, message = case
    arguments = _arguments(extension, "native")
    extension.accumulate_row_dots(**arguments)
    with pytest.raises(error, match=message):
        extension.accumulate_row_dots(**_changed(arguments, name, entry, value))


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_wrong_numbers_are_named_by_the_cuda_kernels(
    cuda_extension: ModuleType, case: tuple
) -> None:
    name, entry, value, error, message = case
    arguments = _changed(_arguments(cuda_extension, "cuda"), name, entry, value)
    with pytest.raises(error, match=message):
        cuda_extension.accumulate_row_dots_cuda(**arguments)


def test_misaligned_data_and_overlapping_workspace_are_refused(extension: ModuleType) -> None:
    arguments = _arguments(extension, "native")
    for name in ("a", "b", "scores", "offset", "parts"):
        misaligned = _changed(arguments, name, 0, arguments[name][0] + 1)
        with pytest.raises(ValueError, match=f"^{name}: data must be aligned"):
            extension.accumulate_row_dots(**misaligned)
    overlapping = _changed(arguments, "parts", 0, arguments["scores"][0])
    with pytest.raises(ValueError, match=r"^parts: must not overlap scores"):
        extension.accumulate_row_dots(**overlapping)
    for output, other in (("scores", "a"), ("scores", "b"), ("parts", "offset")):
        with pytest.raises(ValueError, match=f"^{output}: must not overlap {other}"):
            extension.accumulate_row_dots(**_changed(arguments, output, 0, arguments[other][0]))


@pytest.mark.parametrize(
    "name", ["molora_forward", "molora_backward", "forward_of_few", "with_weight", "in_lanes"]
)
def test_molora_names_the_tensor_that_is_short_misaligned_or_of_another_dtype(
    extension: ModuleType, name: str
) -> None:
    if name == "forward_of_few":
        target = fuzz_extension.molora_forward(extension, num_tokens=3)
        assert "workspace" not in target.memory
    elif name in ("with_weight", "in_lanes"):
        num_tokens = 3 if name == "with_weight" else 11
        target = fuzz_extension.molora_forward(extension, num_tokens=num_tokens, has_weight=True)
    else:
        target = getattr(fuzz_extension, name)(extension)
    target.function(**target.valid)
    for name in target.memory:
        short = _changed(target.valid, name, 1, target.valid[name][1] - 1)
        with pytest.raises(ValueError, match=f"^{name}: .*must stay within"):
            target.function(**short)
        misaligned = _changed(target.valid, name, 0, target.valid[name][0] + 1)
        with pytest.raises(ValueError, match=f"^{name}: data must be aligned"):
            target.function(**misaligned)
        with pytest.raises(ValueError, match=r"^\w+: dtype must be"):
            target.function(**_changed(target.valid, name, 2, extension.DTYPES["float16"]))
    for name in target.outputs:
        overlapping = _changed(target.valid, name, 0, target.valid["a"][0])
        with pytest.raises(ValueError, match=r"must not overlap|must stay within"):
            target.function(**overlapping)
    if "top_k" in target.valid:
        with pytest.raises(ValueError, match=r"^top_k: must be in \[0, 2\], got 3"):
            target.function(**target.valid | {"top_k": 3})
    for name, value in (("shape", (11, 8, 10, 2)), ("scaling", "1"), ("has_base", 1)):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            target.function(**target.valid | {name: value})


def test_no_wrong_number_crashes_or_writes_elsewhere(extension: ModuleType) -> None:
    """In a process of its own, where a crash shows; what is refused and what is not, both occur."""
    result = python("import fuzz_extension; fuzz_extension.main(20000)")
    assert result.returncode == 0, f"{result.returncode}: {result.stderr[-2000:]}"
    counts = [tuple(map(int, line.split())) for line in result.stdout.splitlines()]
    assert len(counts) == 9
    for refused, accepted in counts:
        assert refused > 10000
        assert accepted > 100
