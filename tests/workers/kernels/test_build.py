"""The build of the kernels: what it makes, what it compiles again, how it says that it cannot."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from workers.kernels import native

ROOT = Path(__file__).resolve().parents[3]
REMEDY = "The kernels need GCC 11 or newer: apt install g++, or dnf install gcc-c++\n"


@pytest.fixture(scope="module", autouse=True)
def isa() -> None:
    """Nothing here has to be run once for each instruction set."""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a project with our build.py and sources that compile in no time."""
    csrc = tmp_path / "workers" / "kernels" / "csrc"
    csrc.mkdir(parents=True)
    for file in ("workers/__init__.py", "workers/kernels/__init__.py", "workers/kernels/build.py"):
        shutil.copy(ROOT / file, tmp_path / file)
    (csrc / "answer.h").write_text("int answer();\n")
    (csrc / "abi.cpp").write_text('#include "answer.h"\nint answer() { return 42; }\n')
    (csrc / "kernels.cpp").write_text("namespace XY_ISA { int x() { return 0; } }\n")
    return tmp_path


def test_the_library_needs_the_run_time_of_cpp_and_nothing_of_python() -> None:
    dynamic = subprocess.check_output(["readelf", "-d", native.LIBRARY], text=True)

    needed = {name.split(".")[0] for name in re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)}
    loader = f"ld-linux-{platform.machine().replace('_', '-')}"
    assert needed >= {"libc"}
    assert needed <= {"libstdc++", "libgcc_s", "libm", "libc", "libpthread", loader}


def test_the_library_was_built_for_the_best_instructions_of_this_cpu() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())

    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        assert native.isa() == ("avx512bf16" if "avx512_bf16" in flags else "avx512")
    else:
        assert native.isa() == ("avx2" if {"avx2", "fma", "f16c"} <= flags else "portable")


def test_it_compiles_what_changed_and_nothing_else(project: Path) -> None:
    first, same = build(project), build(project)
    (project / "workers/kernels/csrc/abi.cpp").write_text("int answer() { return 43; }\n")
    source = build(project)
    (project / "workers/kernels/csrc/answer.h").write_text("long answer();\n")
    header = build(project)

    compiled = [re.findall(r" -c \S+/(\S+)\.cpp ", run.stdout) for run in (first, same, source)]
    assert [sorted(set(names)) for names in compiled] == [["abi", "kernels"], [], ["abi"]]
    assert header.stdout.count(" -c ") == first.stdout.count(" -c ")
    assert (project / "workers/kernels/libxykernels.so").exists()


def test_without_a_compiler_it_says_what_to_install(project: Path) -> None:
    failed = build(project, CXX="no-such-compiler")

    assert failed.returncode == 1
    assert failed.stderr == f"No C++ compiler found (no-such-compiler). {REMEDY}"


def test_what_does_not_compile_is_shown_and_leaves_no_object(project: Path) -> None:
    (project / "workers/kernels/csrc/abi.cpp").write_text("int answer() { return 4 2; }\n")
    for failed in (build(project), build(project)):
        assert failed.returncode == 1
        assert "abi.cpp:1:" in failed.stdout
        assert failed.stderr == f"The C++ kernels did not compile; the reason is above. {REMEDY}"


def build(project: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workers.kernels.build"]
    environment = {**os.environ, "PYTHONPATH": "", **environment}
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
