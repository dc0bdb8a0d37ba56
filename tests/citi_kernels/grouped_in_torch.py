"""A stand-in for the grouped functions of `citi_kernels._C`, which run on a GPU alone.

It takes the same numbers: tensors are made from addresses, whatever was said of their sizes. One
slot after another, in fp32; a row of `out` is rounded once, as the kernels do.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import torch
from torch import Tensor

from citi_kernels import compiled

_INT32 = -1


class GroupedInTorch(SimpleNamespace):
    """What `compiled.extension()` gives in a test; `calls` names the functions in order."""

    def __init__(self) -> None:
        super().__init__(DTYPES=compiled.extension().DTYPES, calls=[])

    def grouped_column_tiles(self, num_columns: int) -> int:
        return -(-num_columns // 16)

    def grouped_product_cuda(
        self,
        *,
        routing: tuple,
        choices: tuple,
        features: tuple,
        order: tuple,
        offsets: tuple,
        rows: tuple,
        rows_are_slots: bool,
        weight: tuple,
        weight_is_out_in: bool,
        experts_in_rows: bool,
        out: tuple,
        out_is_slots: bool,
        adds: bool,
        gates: tuple | None,
        scaling: float,
        factors: tuple | None,
        dots: tuple | None,
        device: int,
        stream: int,
    ) -> None:
        self.calls.append("product")
        (num_tokens, num_experts, top_k), (num_in, num_out) = routing, features
        num_slots, (first, end) = num_tokens * top_k, choices
        assert out_is_slots or end - first == 1
        num_rows = {True: num_slots, False: num_tokens}
        rows = self._matrix(rows, num_rows[rows_are_slots], num_in)
        out = self._matrix(out, num_rows[out_is_slots], num_out)
        shape = [num_out, num_in] if weight_is_out_in else [num_in, num_out]
        experts = self._experts(weight, shape, num_experts, experts_in_rows)
        if gates is not None:
            gates = self._matrix(gates, num_tokens, num_experts + 1)
        if dots is not None:
            factors = self._matrix(factors, num_slots, num_out)
            dots = self._vector(dots).view(-1, num_slots)
            assert dots.shape[0] == self.grouped_column_tiles(num_out)
        for e, slots_s, flat_s in self._slots(routing, choices, order, offsets):
            w_IO = experts[e].float()
            product_sO = rows[slots_s if rows_are_slots else flat_s % num_tokens].float() @ (
                w_IO.T if weight_is_out_in else w_IO
            )
            if dots is not None:
                of_columns = (factors[slots_s].float() * product_sO).split(16, dim=1)
                for q, part in enumerate(of_columns):
                    dots[q, flat_s] = scaling * part.sum(1)
            product_sO *= scaling
            if gates is not None:
                product_sO *= gates[flat_s % num_tokens, 1 + e, None]
            to = slots_s if out_is_slots else flat_s % num_tokens
            out[to] = (out[to].float() + product_sO if adds else product_sO).to(out.dtype)

    def grouped_gradient_cuda(
        self,
        *,
        routing: tuple,
        features: tuple,
        order: tuple,
        offsets: tuple,
        left: tuple,
        left_is_slots: bool,
        right: tuple,
        right_is_slots: bool,
        out: tuple,
        experts_in_rows: bool,
        device: int,
        stream: int,
    ) -> None:
        self.calls.append("gradient")
        num_tokens, num_experts, top_k = routing
        num_rows = {True: num_tokens * top_k, False: num_tokens}
        left = self._matrix(left, num_rows[left_is_slots], features[0])
        right = self._matrix(right, num_rows[right_is_slots], features[1])
        experts = self._experts(out, list(features), num_experts, experts_in_rows)
        for e, slots_s, flat_s in self._slots(routing, (0, top_k), order, offsets):
            left_sM = left[slots_s if left_is_slots else flat_s % num_tokens].float()
            right_sN = right[slots_s if right_is_slots else flat_s % num_tokens].float()
            experts[e].copy_(left_sM.T @ right_sN)

    def _slots(self, routing: tuple, choices: tuple, order: tuple, offsets: tuple) -> list[tuple]:
        """Each expert with its slots and their choice * T + token."""
        num_tokens, num_experts, top_k = routing
        order, offsets = self._indices(order), self._indices(offsets)
        assert order.shape[0] == num_tokens * top_k
        assert offsets.shape[0] == num_experts * top_k + 1
        found = []
        for e in range(num_experts):
            start, end = (int(offsets[e * top_k + choice]) for choice in choices)
            slots_s = torch.arange(start, end)
            found.append((e, slots_s, order[slots_s].long()))
        return found

    def _experts(
        self, numbers: tuple, shape: list[int], num_experts: int, in_rows: bool
    ) -> tuple[Tensor, ...]:
        stacked = list(shape)
        stacked[0 if in_rows else 1] *= num_experts
        return self._matrix(numbers, *stacked).chunk(num_experts, dim=0 if in_rows else 1)

    def _matrix(self, numbers: tuple, num_rows: int, num_columns: int) -> Tensor:
        *place, row_stride, column_stride = numbers
        assert column_stride == 1 or num_columns == 1
        return self._memory(*place).as_strided((num_rows, num_columns), (row_stride, 1))

    def _vector(self, numbers: tuple) -> Tensor:
        *place, size = numbers
        return self._memory(*place)[:size]

    def _indices(self, numbers: tuple) -> Tensor:
        data, num_bytes, size = numbers
        return self._memory(data, num_bytes, _INT32)[:size]

    def _memory(self, data: int, num_bytes: int, code: int) -> Tensor:
        names = {number: name for name, number in self.DTYPES.items()} | {_INT32: "int32"}
        bytes_there = (ctypes.c_char * num_bytes).from_address(data)
        return torch.frombuffer(bytes_there, dtype=getattr(torch, names[code]))
