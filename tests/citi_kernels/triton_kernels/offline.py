"""Compiles what an op would launch, for GPUs that are not here, and reads what came out."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from citi_kernels.triton_kernels.launch import Launch

CAPABILITIES = (80, 90, 100)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


class Compiled(NamedTuple):
    """One kernel for one architecture."""

    name: str
    ttir: str
    ptx: str
    shared: int
    registers: int
    spills: int

    @property
    def summary(self) -> str:
        products = self.tensor_core_products
        return (
            f"{self.name}: {self.registers} registers, {self.spills} bytes spilled, "
            f"{self.shared} bytes shared, {products} tensor-core products"
        )

    @property
    def tensor_core_products(self) -> int:
        return len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)", self.ptx))

    @property
    def int32_address_products(self) -> list[str]:
        """Products in int32 that could be offsets: of what `muli` multiplies, no side constant.

        A block's index times its size is a product with a constant and is widened before it.
        """
        constants = set(re.findall(r"(%\S+) = arith\.constant", self.ttir))
        products = re.findall(r"arith\.muli (%\S+), (%\S+)[^:]*: (?:tensor<[\dx]*)?i32", self.ttir)
        return [str(pair) for pair in products if not constants & {p.rstrip(",") for p in pair}]


def identity(launch: Launch) -> tuple:
    """What distinguishes compiled code: the kernel, its constants, argument types and hints."""
    signature, constants, hints = _specialise(launch)
    meta = (launch.meta.num_warps, launch.meta.num_stages)
    return (
        launch.kernel.fn.__name__,
        tuple(sorted(signature.items())),
        tuple(sorted(constants.items(), key=str)),
        tuple(sorted(hints)),
        meta,
    )


def compile_for(launch: Launch, capability: int) -> Compiled:
    signature, constants, hints = _specialise(launch)
    attributes = {path: [["tt.divisibility", 16]] for path in hints}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.meta.num_warps, "num_stages": launch.meta.num_stages}
    out = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _resources(out.asm["cubin"])
    return Compiled(
        launch.kernel.fn.__name__,
        str(out.asm["ttir"]),
        str(out.asm["ptx"]),
        out.metadata.shared,
        registers,
        stack,
    )


def _specialise(launch: Launch) -> tuple[dict[str, Any], dict[Any, Any], list[tuple[int, ...]]]:
    """Signature, constants, and paths of the arguments known to divide by 16, as in a launch."""
    never = set(launch.kernel.do_not_specialize or ())
    signature, constants, hints = {}, {}, []

    def classify(value: Any, path: tuple[int, ...], is_specialised: bool) -> Any:
        if isinstance(value, tuple):
            parts = enumerate(value)
            return tuple(classify(each, (*path, i), is_specialised) for i, each in parts)
        if isinstance(value, Tensor):
            hints.append(path)  # the caching allocator aligns to 512 bytes
            return "*" + _TYPES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if value == 1 and is_specialised:
            constants[path] = 1
            return "constexpr"
        if value % 16 == 0 and is_specialised:
            hints.append(path)
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for index, name in enumerate(launch.kernel.arg_names):
        if name in launch.meta.constants:
            signature[name] = "constexpr"
            constants[(index,)] = launch.meta.constants[name]
        else:
            signature[name] = classify(launch.arguments[name], (index,), name not in never)
    return signature, constants, hints


def is_serialized(compiled: Compiled) -> bool:
    """Whether ptxas had to wait after each wgmma: it only warns, and it costs most of the speed."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.ptx)
        file.flush()
        arguments = ["-arch=sm_90a", "-v", file.name, "-o", os.devnull]
        # which of the two Triton took for this PTX depends on its version
        for tool in (_tool("ptxas"), _tool("ptxas_blackwell")):
            run = subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)
            if run.returncode == 0:
                return "serialized" in run.stderr
    raise RuntimeError(f"no ptxas of Triton's takes the PTX of {compiled.name}: {run.stderr}")


def _tool(name: str) -> str:
    return getattr(triton.knobs.nvidia, name).path


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack, which is where spilled registers go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_tool("cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return int(found[1]), int(found[2])
