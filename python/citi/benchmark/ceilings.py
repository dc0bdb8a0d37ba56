"""Suite "ceilings": what this machine can do at most, to judge the other rows by."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from citi.benchmark.group import DTYPES, Group, Pass, Settings

# bytes copied; rows and columns of the product
_COPIED = {"cpu": 2**28, "cuda": 2**30}
_SIZE = {"cpu": 2048, "cuda": 8192}
COPY, PRODUCT = "copy", "product"


def ceilings_suite(settings: Settings) -> Iterator[Group]:
    """A copy, counted as bytes read and written, and a square product of random numbers."""
    size, copied = _SIZE[settings.device], _COPIED[settings.device]

    def group(row: str, dtype: str, flops: float, num_bytes: float, make) -> Group:
        what = {"bytes": copied} if row == COPY else {"size": size}
        return Group(
            suite="ceilings",
            settings={"what": row, **what, "dtype": dtype},
            baseline=row,
            make=make,
            check=lambda: 0.0,
            stands_for={row: "tensor.copy_" if row == COPY else "torch.mm"},
            tokens=0,
            flops=flops,
            bytes=num_bytes,
        )

    def copy() -> dict[str, Pass]:
        source = torch.randn(copied // 4, device=settings.device)
        target = torch.empty_like(source)
        return {COPY: Pass(lambda: target.copy_(source))}

    def product(dtype: str) -> dict[str, Pass]:
        a, b = (torch.randn(size, size, device=settings.device).to(DTYPES[dtype]) for _ in "ab")
        return {PRODUCT: Pass(lambda: a @ b)}

    yield group(COPY, "fp32", 0.0, 2.0 * copied, copy)
    for dtype in settings.dtypes:
        yield group(PRODUCT, dtype, 2.0 * size**3, 0.0, lambda dtype=dtype: product(dtype))
