"""A layer in one call as Python sees it: what is refused by which name, a launch without a GPU."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from citi_kernels import compiled

T, E, RANK, K, N = 200, 3, 5, 24, 16
R, G = 15, 4
SHAPE = (T, E, RANK, K, N)
DIRECTIONS = ("forward", "backward")
PATHS = {"routed": True, "extended": False}

_KEPT: list[Tensor] = []


def _tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    tensor = torch.zeros(*shape, dtype=dtype)
    _KEPT.append(tensor)
    return tensor


def _matrix(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple:
    return compiled.matrix(_tensor(*shape, dtype=dtype))


def _vector(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple:
    return compiled.vector(_tensor(*shape, dtype=dtype))


def _num_bytes(extension: ModuleType, direction: str, is_routed: bool) -> int:
    if direction == "forward":
        return extension.layer_forward_bytes(shape=SHAPE, is_routed=is_routed)
    needs = (True, True, True)
    return extension.layer_backward_bytes(shape=SHAPE, is_routed=is_routed, needs=needs)


def _arguments(extension: ModuleType, direction: str, is_routed: bool) -> dict:
    """Valid ones, but for the memory, which no GPU has."""
    _KEPT.clear()
    fp32 = torch.float32
    own = {
        "forward": lambda: {"bias": _vector(N), "y": _vector(T, N)},
        "backward": lambda: {
            "dy": _matrix(T, N),
            "dgate": _vector(T, G, dtype=fp32),
            "dx": _vector(T, K),
            "da": _vector(R, K, dtype=fp32),
            "db": _vector(N, R, dtype=fp32),
            "drouter": _vector(G, K, dtype=fp32),
            "side": 0,
        },
    }[direction]()
    num_bytes = _num_bytes(extension, direction, is_routed)
    memory = _tensor(num_bytes + 255, dtype=torch.uint8)
    return own | {
        "shape": SHAPE,
        "is_routed": is_routed,
        "scaling": 0.5,
        "x": _matrix(T, K),
        "weight": _matrix(N, K),
        "a": _matrix(R, K, dtype=fp32),
        "b": compiled.matrix(_tensor(R, N, dtype=fp32).T),
        "router": _matrix(G, K, dtype=fp32),
        "h": _vector(T, R),
        "probs": _vector(T, G, dtype=fp32),
        "workspace": (-(-memory.data_ptr() // 256) * 256, num_bytes),
        "device": 0,
        "stream": 0,
    }


def _call(extension: ModuleType, direction: str, arguments: dict) -> None:
    getattr(extension, f"layer_{direction}_cuda")(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("is_routed", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_launch_without_a_driver_raises(
    cuda_extension: ModuleType, direction: str, is_routed: bool
) -> None:
    arguments = _arguments(cuda_extension, direction, is_routed)
    message = r"could not launch on CUDA: cudaError\w+, \w+"
    with pytest.raises(RuntimeError, match=message):
        _call(cuda_extension, direction, arguments)
    optional = ("bias", "dgate", "da", "db", "drouter")
    without = {name: None for name in optional if name in arguments}
    if direction == "backward":
        without["x"] = None
    with pytest.raises(RuntimeError, match=message):
        _call(cuda_extension, direction, arguments | without)


@pytest.mark.parametrize("is_routed", PATHS.values(), ids=PATHS)
def test_a_backward_that_is_asked_for_less_takes_less_memory(
    cuda_extension: ModuleType, is_routed: bool
) -> None:
    def bytes_for(*needs: bool) -> int:
        return cuda_extension.layer_backward_bytes(shape=SHAPE, is_routed=is_routed, needs=needs)

    everything = bytes_for(True, True, True)
    assert bytes_for(False, False, False) < bytes_for(False, True, False) < everything
    assert bytes_for(True, True, False) < everything


CONVERSION = "incompatible function arguments"
STORAGE = "must stay within"
# direction, name, entry of its tuple, value, error, message
WRONG = {
    "no token": ("forward", "shape", 0, 0, ValueError, r"^num_tokens: must be in \[1, "),
    "no expert": ("backward", "shape", 1, 0, ValueError, "^num_experts: must be in"),
    "odd K": ("forward", "shape", 3, 20, ValueError, "^shape: num_in and num_out must be mult"),
    "enormous N": ("forward", "shape", 4, 2**40, ValueError, "^num_out: must be in"),
    "tokens beyond int32": ("forward", "shape", 0, 2**32, ValueError, "^workspace: must have"),
    "more tokens": ("forward", "shape", 0, 208, ValueError, "^workspace: must have"),
    "x in fp32": ("forward", "x", 2, 0, ValueError, "^x: dtype must be bf16 or fp16"),
    "x a byte short": ("forward", "x", 1, T * K * 2 - 1, ValueError, STORAGE),
    "weight in fp16": ("forward", "weight", 2, 2, ValueError, "^weight: "),
    "a in fp64": ("forward", "a", 2, 3, ValueError, "^sources: dtype must be fp32, bf16 or fp16"),
    "b beyond": ("forward", "b", 3, 17, ValueError, f"^sources: shape and strides {STORAGE}"),
    "a null router": ("forward", "router", 0, 0, ValueError, "^sources: data must not be null"),
    "a short h": ("forward", "h", 3, T * R - 1, ValueError, "^h: must have 3000 entries"),
    "probs in bf16": ("forward", "probs", 2, 1, ValueError, "^probs: dtype must be fp32"),
    "y beyond": ("forward", "y", 1, T * N * 2 - 1, ValueError, f"^y: shape and strides {STORAGE}"),
    "a short workspace": ("forward", "workspace", 1, 4096, ValueError, "^workspace: must have"),
    "no workspace": ("backward", "workspace", 0, 0, ValueError, "^workspace: must have"),
    "dy in fp32": ("backward", "dy", 2, 0, ValueError, "^dy: dtype must be bf16 or fp16"),
    "dx beyond": ("backward", "dx", 1, 64, ValueError, f"^dx: shape and strides {STORAGE}"),
    "a short da": ("backward", "da", 3, R * K - 1, ValueError, "^outputs: must have 360 entries"),
    "db in fp64": ("backward", "db", 2, 3, ValueError, "^outputs: dtype must be fp32, bf16"),
    "a short dgate": ("backward", "dgate", 3, 7, ValueError, "^dgate: must have 800 entries"),
    "a float for a size": ("forward", "shape", 0, 2.0, TypeError, CONVERSION),
    "text for a scaling": ("forward", "scaling", None, "1", TypeError, CONVERSION),
}


@pytest.mark.parametrize("is_routed", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_refused_by_name(
    cuda_extension: ModuleType, case: tuple, is_routed: bool
) -> None:
    direction, name, entry, value, error, message = case
    arguments = _arguments(cuda_extension, direction, is_routed)
    numbers = value
    if entry is not None:
        numbers = list(arguments[name])
        numbers[entry] = value
        numbers = tuple(numbers)
    with pytest.raises(error, match=message):
        _call(cuda_extension, direction, arguments | {name: numbers})


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_workspace_at_another_place_is_refused(
    cuda_extension: ModuleType, direction: str
) -> None:
    arguments = _arguments(cuda_extension, direction, is_routed=True)
    address, num_bytes = arguments["workspace"]
    with pytest.raises(ValueError, match=r"^workspace: data must be aligned"):
        _call(cuda_extension, direction, arguments | {"workspace": (address + 16, num_bytes)})


@pytest.mark.parametrize("is_routed", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize(
    ("direction", "output", "other", "message"),
    [
        ("forward", "y", "workspace", r"^(workspace|y): must not overlap"),
        ("forward", "workspace", "weight", r"^(workspace|counts|u): must not overlap weight"),
        ("backward", "dx", "x", r"^dx: must not overlap x"),
        ("backward", "da", "b", r"^da: must not overlap b"),
    ],
)
def test_what_is_written_overlaps_nothing_that_another_pass_reads(
    cuda_extension: ModuleType,
    direction: str,
    output: str,
    other: str,
    message: str,
    is_routed: bool,
) -> None:
    arguments = _arguments(cuda_extension, direction, is_routed)
    memory = _tensor(2**20, dtype=torch.uint8)
    address, num_bytes = -(-memory.data_ptr() // 256) * 256, 2**20 - 256
    for name in (output, other):
        arguments[name] = (address, num_bytes, *arguments[name][2:])
    with pytest.raises(ValueError, match=message):
        _call(cuda_extension, direction, arguments)
