"""A test double of CUDA functions of `citi_kernels._C`: the skinny passes in PyTorch, on the CPU.

It takes the very numbers that the kernels would, makes tensors of the addresses, and computes what
csrc/skinny_arguments.h says, in fp32, with a cut of its own into parts. Where `_C` was built with
CUDA, the arguments go through its checks first, which a launch without a driver follows.

Shapes: T tokens, K in-features, M columns of a wide matrix, E experts, R stacked rank, G gates;
P = R and Q = G rounded up to 8, Z = P + Q.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from citi_kernels import compiled
from citi_kernels.ops import molora_linear_reference as definition
from citi_kernels.ops.counter_hash import hash_of_columns, hash_of_rows

PLACE = {"device": 0, "stream": 0}
NUM_PARTS = 3
_DTYPES = {0: torch.float32, 1: torch.bfloat16, 2: torch.float16, 3: torch.float64}


class SkinnyDouble:
    """Stands in for the module; counts calls by name, and records their order."""

    def __init__(self) -> None:
        self.DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "float64": 3, "bool": 4}
        self.calls: Counter[str] = Counter()
        self.record: list[str] = []
        missing = compiled.why_missing("cuda")
        self._checks = None if missing else compiled.extension()

    def shrink_cuda_splits(self, *, num_tokens: int, num_inputs: int) -> int:
        if self._checks is None:
            return NUM_PARTS
        return self._checks.shrink_cuda_splits(num_tokens=num_tokens, num_inputs=num_inputs)

    def factor_gradients_cuda_parts(self, **sizes: Any) -> tuple[int, int]:
        if self._checks is None:
            return NUM_PARTS, NUM_PARTS
        return self._checks.factor_gradients_cuda_parts(**sizes)

    def pack_rows_cuda(self, **arguments: Any) -> None:
        call = self._begin("pack_rows_cuda", arguments)
        out = call.vector("out", *call.shape).zero_()
        if call.zeros is not None:
            _numbers(call.zeros).zero_()
        for (address, _, dtype, *strides), first, rows, columns in call.sources:
            source = _tensor(address, dtype, (rows, columns), tuple(strides))
            out[first : first + rows, :columns] = source

    def shrink_cuda(self, **arguments: Any) -> None:
        call = self._begin("shrink_cuda", arguments)
        (T, E, r), K = call.shape, call.num_inputs
        P = _padded(E * r)
        x_TK, stack_ZK = call.matrix("x", T, K), call.vector("stack", -1, K)
        logits_TG = x_TK.float() @ stack_ZK[P : P + E + 1].float().T
        top_k = call.top_k or None
        kept_TE = definition.choose_experts(logits_TG, top_k)
        probs_TG = definition.gate_probabilities(logits_TG, kept_TE, call.renormalizes)
        if kept_TE is not None:
            probs_TG[:, 1:] = torch.where(kept_TE, probs_TG[:, 1:], -probs_TG[:, 1:])
        kept_TK = call.keeps(T, K)
        h_TP = x_TK.float().where(kept_TK, 0.0) @ stack_ZK[:P].float().T * call.inverse_keep
        call.vector("h", T, E * r).copy_(h_TP[:, : E * r])
        call.vector("probs", T, E + 1).copy_(probs_TG)
        call.vector("u", T, P).copy_(_scaled(call.vector("h", T, E * r), probs_TG, P, call))

    def row_product_cuda(self, **arguments: Any) -> None:
        call = self._begin("row_product_cuda", arguments)
        T, M, V = call.shape
        product_TV = call.matrix("wide", T, M).float() @ call.vector("rows", V, M).float().T
        _write_parts(call.vector("parts", -1, T, V), product_TV)

    def factor_gradients_cuda(self, **arguments: Any) -> None:
        call = self._begin("factor_gradients_cuda", arguments)
        if _is_skipped(call):
            return
        T, M, V = call.shape
        wide_TM, narrow_TV = call.matrix("wide", T, M).float(), call.matrix("narrow", T, V).float()
        product_MV = wide_TM.T @ narrow_TV
        if call.dropout is not None:
            kept_TM = wide_TM.where(call.keeps(T, M), 0.0)
            ranks = slice(0, call.rank_columns)
            product_MV[:, ranks] = kept_TM.T @ narrow_TV[:, ranks] * call.inverse_keep
        _write_parts(call.vector("parts", -1, M, V), product_MV)
        if call.num_ranks:
            du_TV = wide_TM.new_zeros(T, V)
            du_TV[:, : call.num_ranks] = wide_TM @ call.vector("b", M, call.num_ranks).float()
            _write_parts(call.vector("du", -1, T, V), du_TV)

    def scale_ranks_cuda(self, **arguments: Any) -> None:
        call = self._begin("scale_ranks_cuda", arguments)
        T, E, r = call.shape
        probs_TG, P = call.vector("probs", T, E + 1), _padded(E * r)
        call.vector("u", T, P).copy_(_scaled(call.vector("h", T, E * r), probs_TG, P, call))

    def rank_gradients_cuda(self, **arguments: Any) -> None:
        call = self._begin("rank_gradients_cuda", arguments)
        T, E, r = call.shape
        R, P = E * r, _padded(E * r)
        marked_TG, h_TR = call.vector("probs", T, E + 1), call.vector("h", T, R).float()
        dropped_TG = marked_TG.signbit() & ~marked_TG.isnan()
        dgate_TG = torch.zeros(T, E + 1)
        if call.dgate is not None:
            dgate_TG += call.vector("dgate", T, E + 1)
        dz_TZ = call.vector("dz", T, -1).zero_()
        if call.du is not None:
            du_TR = call.vector("du", call.num_parts, T, P).sum(0)[:, :R]
            dgate_TG[:, 1:] += call.scaling * (du_TR * h_TR).reshape(T, E, r).sum(2)
            dz_TZ[:, :P] = _scaled(du_TR, marked_TG, P, call)
        dgate_TG.masked_fill_(dropped_TG, 0.0)
        probs_TG = marked_TG.abs()
        inner_T1 = (probs_TG * dgate_TG).sum(1, keepdim=True)
        dz_TZ[:, P : P + E + 1] = probs_TG * (dgate_TG - inner_T1)

    def sum_shares_cuda(self, **arguments: Any) -> None:
        call = self._begin("sum_shares_cuda", arguments)
        sum_MV = call.vector("parts", *call.shape).sum(0)
        for numbers, first, count, is_transposed in call.outputs:
            columns = sum_MV[:, first : first + count]
            out = columns.T if is_transposed else columns
            _tensor(numbers[0], numbers[2], out.shape, out.contiguous().stride()).copy_(out)

    def update_input_gradient_cuda(self, **arguments: Any) -> None:
        call = self._begin("update_input_gradient_cuda", arguments)
        (T, E, r), K = call.shape, call.num_inputs
        P, dx_TK = _padded(E * r), call.matrix("dx", T, K)
        dz_TZ, stack_ZK = call.vector("dz", T, -1).float(), call.vector("stack", -1, K).float()
        through_a = (dz_TZ[:, :P] @ stack_ZK[:P] * call.inverse_keep).where(call.keeps(T, K), 0.0)
        update_TK = through_a + dz_TZ[:, P:] @ stack_ZK[P:]
        dx_TK.copy_(dx_TK.float() + update_TK if call.has_base else update_TK)

    def add_non_finite_cuda(self, **arguments: Any) -> None:
        call = self._begin("add_non_finite_cuda", arguments)
        (T, E, r), M = call.shape, call.num_columns
        right_RM, left_TR = call.matrix("right", E * r, M), call.matrix("left", T, E * r)
        marked_TG = call.vector("probs", T, E + 1)
        dropped_TR = (marked_TG.signbit() & ~marked_TG.isnan())[:, 1:].repeat_interleave(r, dim=1)
        out_TM, kept_TM = call.vector("out", T, M), call.keeps(T, M)
        for row, column in (~right_RM.isfinite()).nonzero().tolist():
            term_T = left_TR[:, row].float() * right_RM[row, column].float() * call.inverse_keep
            counts_T = kept_TM[:, column] & ~dropped_TR[:, row]
            out_TM[:, column] += term_T.where(counts_T, 0.0).to(out_TM.dtype)

    def _begin(self, name: str, arguments: dict[str, Any]) -> _Call:
        self.calls[name] += 1
        self.record.append(name)
        assert {key: arguments[key] for key in PLACE} == PLACE
        if self._checks is not None and not torch.cuda.is_available():
            with pytest.raises(RuntimeError, match="could not launch on CUDA"):
                getattr(self._checks, name)(**arguments)
        return _Call(arguments)


def _is_skipped(call: _Call) -> bool:
    """As blocks of the kernel see it, all alike."""
    if call.done is None:
        return False
    done = _numbers(call.done)
    if call.counts is None:
        return bool(done.all())
    if not (_numbers(call.counts) >= 2).all():
        return True
    done.fill_(1)
    return False


def _numbers(numbers: tuple[int, int, int]) -> Tensor:
    address, _, size = numbers
    memory = (ctypes.c_int32 * size).from_address(address)
    return torch.frombuffer(memory, dtype=torch.int32)


class StreamDouble:
    """A stream by name; what it waits for goes to a record."""

    cuda_stream = PLACE["stream"]

    def __init__(self, name: str, record: list[str]) -> None:
        self.name, self._record = name, record

    def record_event(self) -> str:
        self._record.append(f"{self.name} records")
        return self.name

    def wait_event(self, recorded_by: str) -> None:
        self._record.append(f"{self.name} waits for {recorded_by}")


class _Call:
    """Arguments of one call; tensors by the name of theirs."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = {"dropout": None} | arguments
        self.inverse_keep = self.dropout[3] if self.dropout else 1.0

    def __getattr__(self, name: str) -> Any:
        return self._arguments[name]

    def vector(self, name: str, *shape: int) -> Tensor:
        """The contiguous argument; -1 for the size that follows from its entries."""
        address, num_bytes, dtype, size = self._arguments[name]
        assert size * _DTYPES[dtype].itemsize <= num_bytes
        return _tensor(address, dtype, (size,), (1,)).view(shape)

    def matrix(self, name: str, *shape: int) -> Tensor:
        address, _, dtype, *strides = self._arguments[name]
        return _tensor(address, dtype, shape, tuple(strides))

    def keeps(self, T: int, K: int) -> Tensor:
        if self.dropout is None:
            return torch.ones(T, K, dtype=torch.bool)
        low, high, threshold, _ = self.dropout
        bits_TK = hash_of_columns(hash_of_rows(torch.arange(T), low | high << 32), torch.arange(K))
        return bits_TK.long() % 2**32 >= threshold


def _tensor(address: int, dtype: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """The memory itself."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    kind = _DTYPES[dtype]
    memory = (ctypes.c_char * (reach * kind.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=kind).as_strided(shape, strides)


def _scaled(value_TR: Tensor, marked_TG: Tensor, P: int, call: _Call) -> Tensor:
    """scaling * value ⊙ repeat(gate[1:], r), 0 where dropped; zeros from R to P."""
    _, _, r = call.shape
    gate_TR = marked_TG[:, 1:].repeat_interleave(r, dim=1)
    dropped_TR = gate_TR.signbit() & ~gate_TR.isnan()
    scaled_TR = (value_TR.float() * (call.scaling * gate_TR)).masked_fill(dropped_TR, 0.0)
    return torch.nn.functional.pad(scaled_TR, (0, P - value_TR.shape[1]))


def _write_parts(parts: Tensor, total: Tensor) -> None:
    """Parts that differ and have this sum."""
    parts.copy_(total / parts.shape[0])


def _padded(size: int) -> int:
    return -(-size // 8) * 8
