"""The kernels for Arm's instructions, compiled here and run by an emulator of its CPUs."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from workers.kernels import build

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
ROOT = Path(__file__).resolve().parents[3]
CSRC = ROOT / build.SOURCES

pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason=f"needs {COMPILER} and {EMULATOR}: apt install g++-aarch64-linux-gnu qemu-user",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`other_cpu.cpp` with the kernels of all of Arm's instruction sets."""
    folder = tmp_path_factory.mktemp("arm")
    units = [
        (CSRC / "kernels.cpp", "portable", ["-DXY_ISA=portable"]),
        (CSRC / "kernels.cpp", "armv86", ["-DXY_ISA=armv86", *build.ARMV86_FLAGS]),
        (CSRC / "abi.cpp", "abi", ["-DXY_HAVE_ARMV86"]),
        (CSRC / "threads.cpp", "threads", []),
        # Its twins round where they say so.
        (Path(__file__).with_name("other_cpu.cpp"), "main", ["-ffp-contract=off"]),
    ]

    def compile(source: Path, name: str, flags: list[str]) -> str:
        path = str(folder / f"{name}.o")
        run([COMPILER, *build.FLAGS, "-Werror", *flags, "-c", str(source), "-o", path])
        return path

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile, *zip(*units, strict=True)))
    program = folder / "other_cpu"
    run([COMPILER, "-static", "-pthread", *objects, "-o", str(program)])
    return program


def run(command: list[str]) -> str:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.mark.parametrize(("isa", "has"), [("portable", 0), ("armv86", 1)])
def test_products_of_every_format_are_those_of_their_twins(
    program: Path, isa: str, has: int
) -> None:
    found = run([EMULATOR, "-cpu", "max", str(program), isa])

    assert found == f"{isa}: 7 formats, bf16 dot {has}, int8 dot {has}\n"


def test_a_cpu_without_the_instructions_is_not_given_them(program: Path) -> None:
    old = [EMULATOR, "-cpu", "cortex-a72", str(program)]

    assert run([*old, "portable"]).startswith("portable: 7 formats")
    assert subprocess.run([*old, "armv86"], capture_output=True).returncode == 1
