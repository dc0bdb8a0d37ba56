"""What an installation builds, what it asks of pip, and how it says that it cannot."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
KNOWN = ["compute_75", "compute_80", "compute_89", "compute_90", "compute_100", "compute_120"]
Hide = Callable[..., None]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None, reason="setuptools is not installed"
)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """csrc/extension_build.py, in an environment that chooses nothing."""
    for name in ("CITI_BUILD_CUDA", "CITI_CUDA_ARCHS", "CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    specification = importlib.util.spec_from_file_location(
        "extension_build", ROOT / "csrc" / "extension_build.py"
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def only(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Hide:
    """Makes these the only programs that are found; they say that they are new enough."""

    def apply(*programs: str, pybind11: str | None = "3.0", system: str = "posix") -> None:
        monkeypatch.setattr(
            build.shutil, "which", lambda name: f"/bin/{name}" if name in programs else None
        )
        monkeypatch.setattr(build, "_output", lambda command: "version 99.1")
        version = pybind11 and tuple(map(int, pybind11.split(".")))
        module = version and SimpleNamespace(version_info=(*version, 0))
        monkeypatch.setitem(sys.modules, "pybind11", module)
        monkeypatch.setattr(build.os, "name", system)

    return apply


def test_without_a_compiler_nothing_is_built_nothing_asked_of_pip_and_one_line_says_why(
    build: ModuleType, only: Hide, capsys: pytest.CaptureFixture
) -> None:
    only("cmake", "ninja")
    assert build.extensions() == []
    printed = capsys.readouterr().out
    assert printed == (
        "citi-kernels: installed without citi_kernels._C: no C++ compiler is found "
        "(CXX, c++, g++ or clang++)\n"
    )
    assert build.get_requires_for_build_wheel() == []


def test_only_missing_tools_are_asked_of_pip(build: ModuleType, only: Hide) -> None:
    only("c++", "cmake", "ninja")
    assert build.get_requires_for_build_wheel() == []
    only("c++", "cmake", "ninja", pybind11="2.13")
    assert build.get_requires_for_build_wheel() == ["pybind11>=3.0"]
    only("g++", pybind11=None)
    assert build.get_requires_for_build_wheel() == ["cmake>=3.24", "ninja>=1.11", "pybind11>=3.0"]


def test_without_build_isolation_a_missing_tool_is_named(
    build: ModuleType, only: Hide, capsys: pytest.CaptureFixture
) -> None:
    only("c++", "cmake", pybind11=None)
    assert build.extensions() == []
    wanted = "ninja>=1.11, pybind11>=3.0 not found; pip install 'ninja>=1.11' 'pybind11>=3.0'\n"
    assert capsys.readouterr().out.endswith(wanted)


TOOLS = {
    "does not run": ("#!/bin/sh\necho ModuleNotFoundError: cmake >&2\nexit 1\n", False),
    "is no program": ("", False),
    "is of Ubuntu 22.04": ("#!/bin/sh\necho cmake version 3.22.1\n", False),
    "is the oldest that will do": ("#!/bin/sh\necho cmake version 3.24.0\n", True),
}


def _program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.skipif(os.name == "nt", reason="a shell script is the tool")
@pytest.mark.parametrize(("text", "is_there"), TOOLS.values(), ids=TOOLS)
def test_a_tool_is_there_if_it_runs_and_is_new_enough(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, is_there: bool
) -> None:
    _program(tmp_path / "c++", "#!/bin/sh\n")
    _program(tmp_path / "cmake", text)
    _program(tmp_path / "ninja", "#!/bin/sh\necho 1.11.1\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pybind11", SimpleNamespace(version_info=(3, 1, 0)))
    assert build.get_requires_for_build_wheel() == ([] if is_there else ["cmake>=3.24"])


def test_on_windows_a_compiler_is_one_that_ninja_finds(
    build: ModuleType, only: Hide, monkeypatch: pytest.MonkeyPatch
) -> None:
    only("g++", "cmake", "ninja", system="nt")
    assert build._missing() == "no C++ compiler is found (CXX, cl or clang-cl)"
    only("cl", "cmake", "ninja", system="nt")
    assert build._missing() == ""
    only("g++", "cmake", "ninja", system="nt")
    monkeypatch.setenv("CXX", "g++ -m64")
    assert build._missing() == ""


def test_with_a_compiler_there_is_one_extension(build: ModuleType, only: Hide) -> None:
    only("c++", "cmake", "ninja")
    assert [extension.name for extension in build.extensions()] == ["citi_kernels._C"]


@pytest.mark.parametrize(
    ("programs", "reason"),
    [(("c++", "cmake", "ninja"), "nvcc is not on PATH"), (("nvcc",), "no C.. compiler is found")],
    ids=["no_nvcc", "no_compiler"],
)
def test_cuda_that_is_asked_for_and_cannot_be_built_is_an_error(
    build: ModuleType,
    only: Hide,
    monkeypatch: pytest.MonkeyPatch,
    programs: tuple[str, ...],
    reason: str,
) -> None:
    only(*programs)
    monkeypatch.setenv("CITI_BUILD_CUDA", "1")
    with pytest.raises(build.SetupError, match=f"CITI_BUILD_CUDA=1 wants CUDA.*{reason}"):
        build.extensions()


def test_a_wrong_setting_is_named(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CITI_BUILD_CUDA", "yes")
    with pytest.raises(build.SetupError, match="CITI_BUILD_CUDA: want auto, 0 or 1, got 'yes'"):
        build.extensions()
    monkeypatch.setenv("CITI_CUDA_ARCHS", "hopper")
    with pytest.raises(build.SetupError, match="CITI_CUDA_ARCHS: want names such as"):
        build.cuda_archs(KNOWN)


def test_architectures_are_those_asked_for_or_the_default_ones_that_nvcc_knows(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build.cuda_archs(KNOWN) == ["80", "89", "90a", "100a"]
    assert build.cuda_archs(KNOWN[:-2]) == ["80", "89", "90a"]
    monkeypatch.setenv("CITI_CUDA_ARCHS", "sm_86; 120 90a")
    assert build.cuda_archs(KNOWN) == ["86", "120", "90a"]


@pytest.mark.parametrize(
    ("listed", "archs"),
    [("9.0\n9.0\n", ["90a"]), ("8.6\n10.0\n8.0\n", ["80", "86", "100a"])],
    ids=["alike", "several"],
)
def test_native_architectures_are_those_of_the_gpus(
    build: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    listed: str,
    archs: list[str],
) -> None:
    _program(tmp_path / "nvidia-smi", f"#!/bin/sh\nprintf '{listed}'\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CITI_CUDA_ARCHS", "native")
    assert build.cuda_archs(KNOWN) == archs


@pytest.mark.parametrize("says", [None, "No devices were found", "[N/A]"], ids=str)
def test_native_without_a_gpu_asks_for_names(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, says: str | None
) -> None:
    if says is not None:
        _program(tmp_path / "nvidia-smi", f"#!/bin/sh\necho '{says}'\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CITI_CUDA_ARCHS", "native")
    with pytest.raises(build.SetupError, match="CITI_CUDA_ARCHS: native wants a GPU"):
        build.cuda_archs(KNOWN)


def test_cuda_is_configured_when_nvcc_is_found_unless_it_is_refused(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("pybind11")
    nvcc = _nvcc(tmp_path, "12.0", "compute_80 compute_90")
    monkeypatch.setenv("CUDACXX", str(nvcc))
    command = build._configure_command(build.cuda(), tmp_path, "1.2")
    assert {"-DCITI_BUILD_CUDA=ON", "-DCITI_CUDA_ARCHS=80;90a", "-DCITI_CUDA_PTX=90"} <= {*command}
    assert f"-DCMAKE_CUDA_COMPILER={nvcc}" in command
    assert "-DCITI_VERSION=1.2" in command
    monkeypatch.setenv("CITI_BUILD_CUDA", "0")
    assert "-DCITI_BUILD_CUDA=OFF" in build._configure_command(build.cuda(), tmp_path, "1.2")


def _nvcc(folder: Path, release: str, known: str, code: int = 0) -> Path:
    text = f"case $1 in --version) echo release {release}, V{release};; *) echo {known};; esac"
    return _program(folder / "nvcc", f"#!/bin/sh\n{text}\nexit {code}\n")


NVCC = {
    "broken": (("12.0", "compute_90", 127), "nvcc does not run"),
    "old": (("11.8", "compute_80 compute_90"), "nvcc is of CUDA 11.8, older than 12.0"),
    "of other architectures": (
        ("14.0", "compute_130"),
        "nvcc knows none of the architectures 80, 89, 90a, 100a",
    ),
}
PROJECT = "cmake_minimum_required(VERSION 3.24)\nproject(nothing LANGUAGES NONE)\n"


@pytest.fixture
def project(build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A source of which CMake makes nothing, in a hurry."""
    if missing := [name for name in ("cmake", "ninja", "c++") if shutil.which(name) is None]:
        pytest.skip(f"{', '.join(missing)} not found")
    monkeypatch.setattr(build, "_source_digest", lambda: "digest")
    monkeypatch.setattr(build, "_pybind11_headers", lambda folder: folder)
    monkeypatch.setattr(build, "ROOT", tmp_path / "source")
    (tmp_path / "source" / "build").mkdir(parents=True)
    (tmp_path / "source" / "CMakeLists.txt").write_text(PROJECT)
    return tmp_path / "source"


def _configured(build: ModuleType, source: Path) -> str:
    """What CMake was asked for and said."""
    log = source / "log"
    log.write_text("")
    build._configure(source / "build", "1.2", log)
    return log.read_text()


@pytest.mark.skipif(os.name == "nt", reason="a shell script is the compiler")
@pytest.mark.parametrize(("kind", "reason"), NVCC.values(), ids=NVCC)
def test_an_nvcc_that_will_not_do_is_a_line_or_an_error_where_cuda_is_required(
    build: ModuleType,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    kind: tuple,
    reason: str,
) -> None:
    pytest.importorskip("pybind11")
    monkeypatch.setenv("CUDACXX", str(_nvcc(project, *kind)))
    assert "-DCITI_BUILD_CUDA=OFF" in _configured(build, project)
    wanted = f"citi-kernels: built without CUDA kernels: {project}/{reason}\n"
    assert capsys.readouterr().out == wanted
    monkeypatch.setenv("CITI_BUILD_CUDA", "1")
    with pytest.raises(build.SetupError, match=f"CITI_BUILD_CUDA=1 wants .*{reason}"):
        build.extensions()


@pytest.mark.skipif(os.name == "nt", reason="a shell script is the compiler")
def test_an_nvcc_that_cmake_refuses_is_a_line_or_an_error_where_cuda_is_required(
    build: ModuleType,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("CUDACXX", str(_nvcc(project, "12.0", "compute_90")))
    refusal = 'if(CITI_BUILD_CUDA)\n  message(FATAL_ERROR "unsupported GNU version")\nendif()\n'
    (project / "CMakeLists.txt").write_text(PROJECT + refusal)
    _configured(build, project)
    line = capsys.readouterr().out
    assert line.startswith("citi-kernels: built without CUDA kernels: CMake Error at CMakeLists")
    assert "unsupported GNU version" in line
    monkeypatch.setenv("CITI_BUILD_CUDA", "1")
    with pytest.raises(build.CompileError, match="unsupported GNU version"):
        _configured(build, project)


@pytest.mark.skipif(os.name == "nt", reason="a shell script is the compiler")
def test_the_build_folder_begins_anew_where_cmake_would_not_follow(
    build: ModuleType, project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CITI_BUILD_CUDA", "0")
    _configured(build, project)
    assert "--fresh" not in _configured(build, project)
    monkeypatch.setenv("CXXFLAGS", "-g")
    assert "--fresh" in _configured(build, project)
    monkeypatch.setenv("CXX", str(_program(tmp_path / "other" / "c++", "#!/bin/sh\n")))
    assert "--fresh" in _configured(build, project)
    monkeypatch.setenv("CITI_BUILD_CUDA", "auto")
    for name, is_fresh in (("one", True), ("one", False), ("two", True)):
        monkeypatch.setenv("CUDACXX", str(_nvcc(tmp_path / name, "12.0", "compute_90")))
        assert ("--fresh" in _configured(build, project)) is is_fresh
    monkeypatch.setenv("CITI_BUILD_CUDA", "0")
    assert "--fresh" not in _configured(build, project)
    copy = shutil.copytree(project, tmp_path / "copy")
    monkeypatch.setattr(build, "ROOT", copy)
    assert "--fresh" in _configured(build, copy)
    assert "--fresh" not in _configured(build, copy)


@pytest.mark.skipif(os.name == "nt", reason="a shell script is CMake")
def test_a_module_of_an_older_build_is_not_taken_for_this_ones(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from setuptools import Distribution

    _program(tmp_path / "cmake", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "_configure", lambda *arguments: None)
    command = build.BuildExtension(Distribution({"name": "citi-kernels", "version": "1.2"}))
    command.build_lib = str(tmp_path / "out")
    command.ensure_finalized()
    built = tmp_path / "build" / f"cmake-{sys.implementation.cache_tag}"
    built.mkdir(parents=True)
    old = built / Path(command.get_ext_fullpath("citi_kernels._C")).name
    old.write_text("of an older build")
    with pytest.raises(FileNotFoundError):
        command.build_extension(build.Extension("citi_kernels._C", sources=[]))


def test_a_wheel_holds_no_module_of_an_earlier_one(tmp_path: Path) -> None:
    source = _copy_of_the_source(tmp_path)
    deleted = source / "build" / "lib" / "citi_kernels" / "deleted.py"
    kept = source / "build" / "cmake-cpython" / "a.o"
    for path in (deleted, kept):
        path.parent.mkdir(parents=True)
        path.write_text("")
    result = subprocess.run(
        [sys.executable, "-c", "import extension_build; extension_build.build_wheel('dist')"],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": "csrc", "CXX": "none"},
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = (source / "dist").iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert "citi_kernels/compiled.py" in names
    assert "citi_kernels/deleted.py" not in names
    assert kept.is_file()


LOGS = {
    "compiler": (
        "[1/4] Building CXX object a.o\nFAILED: a.o \n/usr/bin/c++ -Werror -c a.cpp\n"
        "a.cpp:3:1: error: expected ';'\nninja: build stopped: subcommand failed.\n",
        "a.cpp:3:1: error: expected ';'",
    ),
    "nvcc": (
        "[1/4] Building CUDA object\nFAILED: k.o\nnvcc fatal   : Unsupported gpu architecture\n",
        "nvcc fatal   : Unsupported gpu architecture",
    ),
    "linker": (
        "[4/4] Linking\nld: a.o: undefined reference to `f'\ncollect2: error: ld returned 1\n",
        "ld: a.o: undefined reference to `f'",
    ),
    "cmake": (
        "-- Detecting\nCMake Error at CMakeLists.txt:20 (find_package):\n  Could not find Python\n",
        "CMake Error at CMakeLists.txt:20 (find_package): Could not find Python",
    ),
    "no word of an error": ("one\ntwo\n", "two"),
    "silence": ("", "no output"),
}


@pytest.mark.parametrize(("log", "line"), LOGS.values(), ids=LOGS)
def test_the_line_that_matters_is_found(build: ModuleType, log: str, line: str) -> None:
    assert build.first_error(log) == line


def _copy_of_the_source(folder: Path) -> Path:
    for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "citi_kernels", "python"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.jsonl.gz")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


@pytest.mark.skipif(os.name == "nt", reason="a shell script is the compiler")
@pytest.mark.parametrize("tool", ["cmake", "ninja"])
def test_a_compiler_that_fails_ends_the_build_with_that_line(tool: str, tmp_path: Path) -> None:
    """A real run of setup.py with CMake, and with a compiler that finds fault with our source."""
    pytest.importorskip("pybind11")
    if missing := [name for name in ("cmake", "ninja", "c++") if shutil.which(name) is None]:
        pytest.skip(f"{', '.join(missing)} not found")
    source = _copy_of_the_source(tmp_path)
    broken = source / ("CMakeLists.txt" if tool == "cmake" else "csrc/tensors.cpp")
    word = "project(citi_kernels" if tool == "cmake" else "namespace citi {"
    broken.write_text(broken.read_text().replace(word, f"nonsense {word}", 1))
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "out")],
        cwd=source,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        env=os.environ | {"CITI_BUILD_CUDA": "0"},
    )
    assert result.returncode != 0
    last = result.stdout.splitlines()[-1]
    wanted = "CMake Error at CMakeLists.txt" if tool == "cmake" else "tensors.cpp:3:1: error: "
    assert last.startswith("error: ")
    assert wanted in last
    assert "(all of it: " in last
    assert "build.log)" in last
