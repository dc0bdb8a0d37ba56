"""How `pip install` builds `citi_kernels._C`: the backend that pip calls, and what setup.py needs.

    CITI_BUILD_CUDA   auto (default): CUDA kernels if an nvcc of CUDA 12 or newer works, or a line
                      that says why not; 1: it is required; 0: none
    CITI_CUDA_ARCHS   such as "80;90a" (default: 80;89;90a;100a, those that this nvcc knows), or
                      native: those of this machine's GPUs, for a quicker build; PTX of the newest
                      is added, without its letter, so that GPUs to come can run it
    CITI_WERROR       1: warnings of the compilers are errors, as in CI

Without a C++ compiler the package installs as pure Python, and one line says so. CMake, ninja and
pybind11 are asked of pip only where something can be built and they are not there already, so that
an installation without network asks for setuptools alone. The build folder stays: a rebuild
compiles what changed, and all of it where the compilers or the place of the source did.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

__all__ = [
    "BuildExtension",
    "build_editable",
    "build_sdist",
    "build_wheel",
    "extensions",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_ARCHS = ("80", "89", "90a", "100a")
LEAST_VERSIONS = {"cmake": (3, 24), "ninja": (1, 11), "pybind11": (3, 0)}
LEAST_CUDA = (12, 0)  # TMA, and architectures with a letter
_ERROR = re.compile(r"\berror\b|CMake Error|nvcc fatal|ninja: fatal|undefined reference", re.I)


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    """The tools that are missing; setup.py, which would miss them as well, does not run for it."""
    return _absent_tools() if _compiler() else []


def get_requires_for_build_sdist(config_settings: dict | None = None) -> list[str]:
    """Nothing is built."""
    return []


get_requires_for_build_editable = get_requires_for_build_wheel


def build_wheel(
    wheel_directory: str,
    config_settings: dict | None = None,
    metadata_directory: str | None = None,
) -> str:
    """Without what earlier wheels left in build/, such as deleted modules; CMake's folders stay."""
    for pattern in ("lib*", "bdist*"):
        for folder in (ROOT / "build").glob(pattern):
            shutil.rmtree(folder)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def extensions() -> list[Extension]:
    """The extension, or none, with a line that says why.

    Raises:
        SetupError: CITI_BUILD_CUDA has another value, or it is 1 and CUDA cannot be built.
    """
    wanted = os.environ.get("CITI_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SetupError(f"CITI_BUILD_CUDA: want auto, 0 or 1, got {wanted!r}")
    missing = _missing()
    if wanted == "1" and (what := missing or cuda().why_not):
        raise SetupError(f"CITI_BUILD_CUDA=1 wants CUDA kernels, but {what}")
    if missing:
        print(f"citi-kernels: installed without citi_kernels._C: {missing}", flush=True)
        return []
    return [Extension("citi_kernels._C", sources=[])]


class BuildExtension(build_ext):
    """Builds with CMake and ninja, in a folder that stays."""

    def build_extension(self, extension: Extension) -> None:
        library = Path(self.get_ext_fullpath(extension.name)).resolve()
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "build.log"
        log.write_text("")
        _configure(folder, self.distribution.get_version(), log)
        # one of an older build is never taken for this one's
        (folder / library.name).unlink(missing_ok=True)
        _run(["cmake", "--build", str(folder)], log)
        library.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / library.name, library)
        print(f"citi-kernels: built {library}", flush=True)


def nvcc() -> str | None:
    """Path of the CUDA compiler: CUDACXX, PATH, CUDA_HOME, or where its installer puts it."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [os.environ.get("CUDACXX"), "nvcc"]
    candidates += [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    return next(filter(None, (shutil.which(name) for name in candidates if name)), None)


class Cuda(NamedTuple):
    """What compiles the CUDA kernels; no architecture: they are left out, and why."""

    compiler: str | None = None
    archs: tuple[str, ...] = ()
    why_not: str = ""


def cuda() -> Cuda:
    """nvcc and the architectures to build, unless CITI_BUILD_CUDA is 0.

    Raises:
        SetupError: an entry of CITI_CUDA_ARCHS is no architecture.
    """
    compiler = nvcc()
    if os.environ.get("CITI_BUILD_CUDA") == "0":
        return Cuda(why_not="CITI_BUILD_CUDA is 0")
    if compiler is None:
        return Cuda(why_not="nvcc is not on PATH, nor in CUDA_HOME")
    version = _version(compiler, r"release (\d+)\.(\d+)")
    if version is None:
        return Cuda(compiler, why_not=f"{compiler} does not run")
    if version < LEAST_CUDA:
        return Cuda(compiler, why_not=f"{compiler} is of CUDA {_dotted(version)}, older than 12.0")
    known = (_output([compiler, "--list-gpu-arch"]) or "").split()
    archs = cuda_archs(known)
    if not any(f"compute_{arch.rstrip('af')}" in known for arch in archs):
        wanted = ", ".join(archs or DEFAULT_ARCHS)
        return Cuda(compiler, why_not=f"{compiler} knows none of the architectures {wanted}")
    return Cuda(compiler, tuple(archs))


def cuda_archs(known: list[str]) -> list[str]:
    """Architectures to build: those asked for, or of the default ones what nvcc knows.

    Args:
        known: what `nvcc --list-gpu-arch` prints, such as "compute_90"; names without letters.
    Raises:
        SetupError: an entry is no architecture, or "native" and there is no GPU.
    """
    asked = os.environ.get("CITI_CUDA_ARCHS")
    if not asked:
        return [arch for arch in DEFAULT_ARCHS if f"compute_{arch.rstrip('a')}" in known]
    if asked.strip() == "native":
        return _archs_of_this_machine()
    archs = [entry.removeprefix("sm_") for entry in re.split(r"[;,\s]+", asked.strip())]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            raise SetupError(f'CITI_CUDA_ARCHS: want names such as "80;90a", got {asked!r}')
    return archs


def _archs_of_this_machine() -> list[str]:
    """Of its GPUs; with the letter where the default has one, for kernels that need it."""
    listed = _output(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]) or ""
    found = [major + minor for major, minor in re.findall(r"^(\d+)\.(\d)\s*$", listed, re.M)]
    if not found:
        raise SetupError(
            "CITI_CUDA_ARCHS: native wants a GPU that nvidia-smi lists, and there is none; "
            'name the architectures, such as "80;90a"'
        )
    with_letter = {arch.rstrip("a"): arch for arch in DEFAULT_ARCHS}
    archs = {with_letter.get(arch, arch) for arch in found}
    return sorted(archs, key=lambda arch: int(arch.rstrip("a")))


def first_error(output: str) -> str:
    """The line of a build's output that matters."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    found = next((i for i, line in enumerate(lines) if _ERROR.search(line)), None)
    if found is None:
        return lines[-1] if lines else "no output"
    # CMake says where in one line and what in the next
    is_headline = lines[found].startswith("CMake Error") and lines[found].endswith(":")
    return " ".join(lines[found : found + 1 + is_headline])


def _configure(folder: Path, version: str, log: Path) -> None:
    """With CUDA if it works; CMake may find that nvcc and the C++ compiler do not go together."""
    found = cuda()
    try:
        _configure_with(found, folder, version, log)
    except CompileError as error:
        if not found.archs or os.environ.get("CITI_BUILD_CUDA") == "1":
            raise
        found = Cuda(found.compiler, why_not=str(error))
        _configure_with(found, folder, version, log)
    if found.compiler and found.why_not:
        print(f"citi-kernels: built without CUDA kernels: {found.why_not}", flush=True)


def _configure_with(found: Cuda, folder: Path, version: str, log: Path) -> None:
    """CMake keeps what it found once, and drops settings where a compiler changes: it begins anew
    unless what it cannot follow is as stamped."""
    path, partial = folder / "stamp.json", folder / "stamp.partial"
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    stamp = _stamp(found)
    if not found.archs:
        stamp["nvcc"] = earlier.get("nvcc", "")  # it is not looked at
    path.unlink(missing_ok=True)
    _run(_configure_command(found, folder, version) + ["--fresh"] * (stamp != earlier), log)
    partial.write_text(json.dumps(stamp))
    partial.replace(path)


def _configure_command(found: Cuda, folder: Path, version: str) -> list[str]:
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(folder),
        "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
        "Python_EXECUTABLE": sys.executable,
        "CITI_PYBIND11_INCLUDE": str(_pybind11_headers(folder)),
        "CITI_VERSION": version,
        "CITI_SOURCES": _source_digest(),
        "CITI_BUILD_CUDA": "OFF",
        "CITI_WERROR": "ON" if os.environ.get("CITI_WERROR") == "1" else "OFF",
    }
    if found.archs:
        options |= {
            "CITI_BUILD_CUDA": "ON",
            "CMAKE_CUDA_COMPILER": found.compiler,
            "CITI_CUDA_ARCHS": ";".join(found.archs),
            "CITI_CUDA_PTX": str(max(int(arch.rstrip("af")) for arch in found.archs)),
        }
    settings = [f"-D{name}={value}" for name, value in options.items()]
    return ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *settings]


def _stamp(found: Cuda) -> dict[str, str]:
    names = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDAFLAGS", "CUDAHOSTCXX")
    return {
        **{name: os.environ.get(name, "") for name in names},
        "source": str(ROOT),
        "python": sys.executable,
        "suffix": sysconfig.get_config_var("EXT_SUFFIX") or "",
        "compiler": os.path.realpath(_compiler() or ""),
        "nvcc": os.path.realpath(found.compiler or ""),
    }


def _source_digest() -> str:
    """By a file of the package that stands alone; the package itself needs torch."""
    path = ROOT / "citi_kernels" / "source_digest.py"
    specification = importlib.util.spec_from_file_location("source_digest", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.source_digest(ROOT)


def _pybind11_headers(folder: Path) -> Path:
    """A copy in the build folder: pip's build environment, another each time, would rebuild all."""
    import pybind11

    headers = folder / f"pybind11-{pybind11.__version__}"
    if not headers.is_dir():
        partial = headers.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(pybind11.get_include(), partial)
        partial.rename(headers)
    return headers


def _run(command: list[str], log: Path) -> None:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n{result.stdout}")
    if result.returncode:
        raise CompileError(f"{first_error(result.stdout)} (all of it: {log})")


def _compiler_names() -> tuple[str, ...]:
    # ninja needs Visual Studio's own on PATH, as its command prompt has it
    return ("cl", "clang-cl") if os.name == "nt" else ("c++", "g++", "clang++")


def _compiler() -> str | None:
    asked = os.environ.get("CXX")
    names = (asked.split()[0],) if asked else _compiler_names()
    return next(filter(None, map(shutil.which, names)), None)


def _output(command: list[str]) -> str | None:
    """What it prints, or None where it does not run to its end."""
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return None
    return None if result.returncode else result.stdout.decode(errors="replace")


def _version(program: str, pattern: str = r"(\d+)\.(\d+)") -> tuple[int, int] | None:
    """Of a program that is there and runs."""
    path = shutil.which(program)
    found = re.search(pattern, (path and _output([path, "--version"])) or "")
    return (int(found[1]), int(found[2])) if found else None


def _pybind11_version() -> tuple[int, int] | None:
    try:
        import pybind11
    except ImportError:
        return None
    return pybind11.version_info[:2]


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _absent_tools() -> list[str]:
    """As pip asks for them. One on PATH may not run, as a venv's wrapper in another environment."""
    versions = {name: _version(name) for name in ("cmake", "ninja")}
    versions["pybind11"] = _pybind11_version()
    return [
        f"{name}>={_dotted(least)}"
        for name, least in LEAST_VERSIONS.items()
        if (versions[name] or (0, 0)) < least
    ]


def _missing() -> str:
    if not _compiler():
        names = _compiler_names()
        return f"no C++ compiler is found (CXX, {', '.join(names[:-1])} or {names[-1]})"
    absent = _absent_tools()
    quoted = " ".join(f"'{each}'" for each in absent)
    return f"{', '.join(absent)} not found; pip install {quoted}" if absent else ""
