"""Scores of a tile by `citi_kernels._C` as Python sees it, and as it was built."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from test_built_objects import objects, symbols
from test_extension import python
from test_parameter_scores_extension import INCOMPATIBLE, changed
from torch import Tensor

from citi_kernels import compiled, environment

# rows 6 to 11 of a weight of 15 rows, in segments of 3
SIZES = {"shape": (6, 8), "begin": (6, 0), "segments": (5, 1), "lengths": (3, 8)}
_KEPT: list[Tensor] = []


def arguments_of(extension: ModuleType) -> dict:
    tensors = {
        "gradient": torch.ones(6, 8),
        "weight": torch.ones(6, 8, dtype=torch.bfloat16),
        "scores": torch.zeros(5, dtype=torch.float64),
        "sums": torch.full((extension.score_tile_sums(**SIZES),), torch.nan, dtype=torch.float64),
    }
    _KEPT[:] = tensors.values()
    numbers = {
        name: compiled.matrix(each) if each.dim() == 2 else compiled.vector(each)
        for name, each in tensors.items()
    }
    return SIZES | numbers | {"scale": 1.0, "seed": 2**64 - 1, "num_threads": 2}


def test_scores_go_where_the_tile_lies(extension: ModuleType) -> None:
    extension.accumulate_score_tile(**arguments_of(extension))
    assert _KEPT[2].tolist() == [0, 0, 24, 24, 0]


WRONG = {
    "no row": ("shape", 0, 0, ValueError, "tile: rows must be positive"),
    "rows of a float": ("shape", 0, 6.0, TypeError, INCOMPATIBLE),
    "too many columns": ("shape", 1, 2**62, ValueError, "tile: columns must be positive"),
    "before the first": ("begin", 0, -3, ValueError, "tile: rows must be positive, begin at 0"),
    "beyond the last": ("begin", 0, 12, ValueError, "tile: rows must end within the 15 of weight"),
    "half a segment": ("begin", 0, 7, ValueError, "tile: must hold whole segments of 3 rows"),
    "no segment": ("segments", 1, 0, ValueError, "segments: their number and length must be"),
    "a length of nothing": ("lengths", 0, 0, ValueError, "segments: their number and length must"),
    "gradient null": ("gradient", 0, 0, ValueError, "gradient: data must not be null"),
    "gradient in fp64": ("gradient", 2, 3, ValueError, "gradient: dtype must be fp32, bf16 or"),
    "rows beyond": ("gradient", 3, 9, ValueError, "gradient: shape and strides must stay within"),
    "columns apart": ("weight", 4, 0, ValueError, "weight: column stride must be 1"),
    "weight of bool": ("weight", 2, 4, ValueError, "weight: dtype must be floating"),
    "weight a byte short": ("weight", 1, 95, ValueError, "weight: shape and strides must stay"),
    "scores in bf16": ("scores", 2, 1, ValueError, "scores: dtype must be fp32 or fp64, or bf16"),
    "four scores": ("scores", 3, 4, ValueError, "scores: must have 5 entries, got 4"),
    "sums left out": ("sums", None, None, ValueError, "sums: must be given"),
    "sums in fp32": ("sums", 2, 0, ValueError, "sums: dtype must be fp64"),
    "five sums": ("sums", 3, 5, ValueError, "sums: must have 6 entries, got 5"),
    "a scale of text": ("scale", None, "1", TypeError, INCOMPATIBLE),
    "a negative seed": ("seed", None, -1, TypeError, INCOMPATIBLE),
    "no thread": ("num_threads", None, 0, ValueError, r"num_threads: must be in \[1, 4096\]"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_wrong_numbers_are_named(extension: ModuleType, case: tuple) -> None:
    name, entry, value, error, message = case
    arguments = arguments_of(extension)
    with pytest.raises(error, match=message):
        extension.accumulate_score_tile(**changed(arguments, name, entry, value))
    assert not _KEPT[2].any()


def test_misaligned_data_and_overlapping_outputs_are_refused(extension: ModuleType) -> None:
    arguments = arguments_of(extension)
    for name in ("gradient", "weight", "scores", "sums"):
        with pytest.raises(ValueError, match=f"^{name}: data must be aligned"):
            extension.accumulate_score_tile(**changed(arguments, name, 0, arguments[name][0] + 1))
    with pytest.raises(ValueError, match=r"^sums: must not overlap scores"):
        extension.accumulate_score_tile(**changed(arguments, "sums", 0, arguments["scores"][0]))
    for output, other in (("scores", "gradient"), ("scores", "weight"), ("sums", "gradient")):
        with pytest.raises(ValueError, match=f"^{output}: must not overlap {other}"):
            extension.accumulate_score_tile(**changed(arguments, output, 0, arguments[other][0]))


@pytest.fixture
def variants(extension: ModuleType) -> Iterator[tuple[str, ...]]:
    yield extension.cpu_features
    extension.use_cpu_variant(environment.CPU_FEATURES)


@pytest.mark.parametrize("segments", [(1, 1), (300, 1), (1, 130), (300, 130)], ids=str)
def test_neither_the_variant_nor_the_threads_change_a_bit(
    extension: ModuleType, variants: tuple[str, ...], segments: tuple[int, int]
) -> None:
    dtype = torch.bfloat16 if segments == (300, 130) else torch.float64
    torch.manual_seed(0)
    gradient, weight = torch.randn(2, 300, 130).bfloat16()
    sizes = {"shape": (300, 130), "begin": (0, 0), "segments": segments}
    sizes["lengths"] = (300 // segments[0], 130 // segments[1])
    num_sums = extension.score_tile_sums(**sizes)
    expected = None
    for variant in variants:
        extension.use_cpu_variant(variant)
        for num_threads in (1, 2, 5):
            scores = torch.ones(segments, dtype=dtype)
            sums = torch.full((num_sums,), torch.nan, dtype=torch.float64) if num_sums else None
            extension.accumulate_score_tile(
                **sizes,
                gradient=compiled.matrix(gradient),
                weight=compiled.matrix(weight),
                scores=compiled.vector(scores),
                scale=0.5,
                seed=3,
                sums=compiled.vector(sums),
                num_threads=num_threads,
            )
            expected = scores if expected is None else expected
            assert torch.equal(scores, expected), (variant, num_threads)
    assert not torch.equal(expected, torch.ones_like(expected))


def test_no_wrong_number_crashes_or_writes_elsewhere(extension: ModuleType) -> None:
    """In a process of its own, where a crash shows; what is refused and what is not, both occur."""
    result = python("import fuzz_score_tile; fuzz_score_tile.main(20000)")
    assert result.returncode == 0, f"{result.returncode}: {result.stderr[-2000:]}"
    refused, accepted = map(int, result.stdout.split())
    assert refused > 10000
    assert accepted > 100


@pytest.mark.parametrize("variant", ["Avx2", "Avx512"])
def test_a_variant_shares_no_function_with_older_cpus(extension: ModuleType, variant: str) -> None:
    (path,) = objects(f"score_tile_{variant.lower()}.cpp.o")
    defined = [line.split(maxsplit=2)[1:] for line in symbols(path, "--defined-only")]
    shared = [name for letter, name in defined if letter in "TWVuBDi"]
    assert [name.split("(")[0] for name in shared] == [f"citi::ScoresOfTask{variant}"]
