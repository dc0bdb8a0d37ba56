"""The importance kernels as scoring launches them: how many, and compiled for every architecture.

Recorded on meta tensors, where a host read (.item(), nonzero, ...) raises: each recording proves
that there is none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from citi_kernels.ops import importance_triton
from citi_kernels.triton_kernels import parameter_scores
from citi_kernels.triton_kernels.launch import Launch, recorded_launches
from layer_launches import LibraryLaunches, names
from offline import CAPABILITIES, SHARED_MEMORY, Compiled, compile_for, identity, is_serialized

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Scoring:
    """One call: T tokens, K in-features, N out-features, the shape of the scores."""

    T: int = 8192
    N: int = 4096
    K: int = 4096
    granularity: str = "component"
    dtype: torch.dtype = torch.bfloat16
    scores_dtype: torch.dtype = torch.float64
    other_dtype: torch.dtype | None = None
    masked: bool = False
    variant: bool = False  # signed row dots with an offset; parameters token by token
    transposed: str = ""

    def parameters(self) -> None:
        shape = {
            "component": (1, 1),
            "rows": (self.N, 1),
            "columns": (1, self.K),
            "heads": (self.N // 128, 1),
            "blocks": (2, 2),
            "elements": (self.N, self.K),
        }[self.granularity]
        importance_triton.accumulate_parameter_scores_(
            meta(*shape, dtype=self.scores_dtype),
            self._matrix("weight", self.N, self.K, self.other_dtype),
            self._matrix("x", self.T, self.K, self.other_dtype),
            self._matrix("g", self.T, self.N),
            self._valid(),
            self.variant,
            1.0,
            2**40 + 5,
        )

    def row_dots(self) -> None:
        num_segments = {"component": 1, "heads": self.K // 128, "columns": self.K}
        importance_triton.accumulate_row_dots_(
            meta(num_segments[self.granularity], dtype=self.scores_dtype),
            self._matrix("a", self.T, self.K),
            self._matrix("b", self.T, self.K, self.other_dtype),
            self._valid(),
            meta(self.K, dtype=self.dtype) if self.variant else None,
            self.variant,
        )

    def _matrix(
        self, name: str, rows: int, columns: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        if name in self.transposed.split():
            return meta(columns, rows, dtype=dtype or self.dtype).T
        return meta(rows, columns, dtype=dtype or self.dtype)

    def _valid(self) -> Tensor | None:
        return meta(self.T, dtype=torch.bool) if self.masked else None


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


PARAMETERS = [
    *(Scoring(T, N, granularity=each) for T in (512, 2048, 8192) for N in (4096, 14336)
      for each in ("component", "rows", "columns", "heads", "elements")),
    Scoring(masked=True),
    Scoring(granularity="columns", variant=True),
    Scoring(granularity="elements", scores_dtype=torch.bfloat16),
    Scoring(granularity="elements", scores_dtype=torch.float32),
    Scoring(other_dtype=torch.float32),
    Scoring(granularity="elements", other_dtype=torch.float32, scores_dtype=torch.float32),
    Scoring(granularity="rows", transposed="weight"),
    Scoring(N=1024, K=1024, granularity="rows"),
]  # fmt: skip
ODD_PARAMETERS = [
    *(Scoring(1000, 530, 371, each) for each in ("component", "rows", "columns", "elements")),
    Scoring(T=1, N=19, K=33, granularity="rows", masked=True, variant=True),
    Scoring(T=8191, granularity="rows", transposed="weight x g", masked=True),
]
ROW_DOTS = [
    *(Scoring(T, K=K, granularity=each) for T in (512, 2048, 8192) for K in (4096, 14336)
      for each in ("component", "heads", "columns")),
    *(Scoring(granularity=each, masked=True, variant=True)
      for each in ("component", "heads", "columns")),
    Scoring(scores_dtype=torch.float32),
]  # fmt: skip
ODD_ROW_DOTS = [
    *(Scoring(1000, K=371, granularity=each) for each in ("component", "heads", "columns")),
    Scoring(T=1, K=33, granularity="columns", masked=True, variant=True),
    Scoring(granularity="heads", other_dtype=torch.float32, transposed="a"),
]


def launches_of(parameters: list[Scoring], row_dots: list[Scoring], dtype) -> list[Launch]:
    """The distinct launches of calls in `dtype`."""
    with recorded_launches() as recorded:
        for each in parameters:
            replace(each, dtype=dtype).parameters()
        for each in row_dots:
            replace(each, dtype=dtype).row_dots()
    return list({identity(each): each for each in recorded}.values())


def compile_within_limits(launch: Launch, capability: int) -> Compiled:
    compiled = compile_for(launch, capability)
    print(compiled.summary)
    assert compiled.shared <= SHARED_MEMORY[capability], compiled.summary
    assert compiled.int32_address_products == [], compiled.summary
    return compiled


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_main_sizes_compile_to_tensor_cores_and_do_not_spill(
    capability: int, dtype: torch.dtype
) -> None:
    launches = launches_of(PARAMETERS, ROW_DOTS, dtype)
    assert {each.kernel.fn.__name__ for each in launches} == {
        "_parameter_scores_kernel",
        "_row_dots_kernel",
        "_score_sums_kernel",
    }
    for launch in launches:
        compiled = compile_within_limits(launch, capability)
        assert compiled.spills <= 16, compiled.summary
        if compiled.name == "_parameter_scores_kernel" and dtype != torch.float32:
            assert compiled.tensor_core_products > 0, compiled.summary
            assert capability != 90 or "wgmma.mma_async" in compiled.ptx, compiled.summary


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_odd_sizes_and_strides_compile_within_limits(capability: int, dtype: torch.dtype) -> None:
    for launch in launches_of(ODD_PARAMETERS, ODD_ROW_DOTS, dtype):
        compile_within_limits(launch, capability)


def test_no_kernel_waits_for_every_single_wgmma() -> None:
    for launch in launches_of([*PARAMETERS, *ODD_PARAMETERS], [], torch.bfloat16):
        compiled = compile_for(launch, 90)
        assert not is_serialized(compiled), compiled.summary


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_row_dots_load_16_bytes_at_a_time(dtype: torch.dtype) -> None:
    for launch in launches_of([], [replace(each, masked=False) for each in ROW_DOTS], dtype):
        if (
            launch.kernel.fn.__name__ == "_row_dots_kernel"
            and not launch.meta.constants["HAS_OFFSET"]
        ):
            ptx = compile_for(launch, 90).ptx
            assert ptx.count("ld.global") == ptx.count("ld.global.v4.b32") > 0


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("variant", [False, True])
def test_every_call_is_two_launches_and_elements_are_one(masked: bool, variant: bool) -> None:
    for granularity in ("component", "rows", "columns", "heads", "elements"):
        scoring = Scoring(granularity=granularity, masked=masked, variant=variant)
        with recorded_launches() as ours, LibraryLaunches() as library:
            scoring.parameters()
        stages = ["parameter_scores", "score_sums"][: 1 if granularity == "elements" else 2]
        assert (names(ours), library.names) == (stages, [])
    for granularity in ("component", "heads", "columns"):
        scoring = Scoring(granularity=granularity, masked=masked, variant=variant)
        with recorded_launches() as ours, LibraryLaunches() as library:
            scoring.row_dots()
        assert (names(ours), library.names) == (["row_dots", "score_sums"], [])


def test_blocks_go_to_the_library() -> None:
    with recorded_launches() as ours, LibraryLaunches() as library:
        Scoring(T=64, N=64, K=64, granularity="blocks").parameters()
    assert ours == []
    assert "mm" in library.names


@pytest.mark.parametrize("num_tokens", [512, 2048, 8192])
@pytest.mark.parametrize("granularity", ["component", "heads", "columns"])
def test_row_dots_fill_the_gpu_with_a_small_workspace(num_tokens: int, granularity: str) -> None:
    with recorded_launches() as ours:
        Scoring(num_tokens, granularity=granularity).row_dots()
    assert ours[0].grid[0] >= 132
    workspace = ours[0].arguments["parts_ptr"]
    assert workspace.numel() * workspace.element_size() <= 4 * 2**20


def test_small_weights_are_cut_into_more_tiles() -> None:
    """Tiles of 128 x 256 would leave most multiprocessors of an H100 idle."""
    tiles = {}
    for size in (1024, 2048, 4096, 14336):
        meta_of = parameter_scores.launch_meta(
            size, 4096 if size > 4096 else size, torch.bfloat16, torch.float64, "rows", 132
        )
        tiles[size] = (meta_of.constants["BLOCK_N"], meta_of.constants["BLOCK_K"])
    assert tiles == {1024: (128, 64), 2048: (128, 256), 4096: (128, 256), 14336: (128, 256)}


def test_the_unbounded_axis_lies_on_grid_x() -> None:
    with recorded_launches() as ours:
        Scoring(T=2**33, K=64).row_dots()
        Scoring(T=2**33, K=64, granularity="columns").row_dots()
        Scoring(T=2**33, N=64, K=64).parameters()
    assert all(len(each.grid) == 1 and each.grid[0] < 2**31 for each in ours)
