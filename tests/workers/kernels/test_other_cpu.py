"""The kernels for instructions that this CPU may lack: Arm's on an emulator, AMX's by its twin."""

import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from workers.kernels import build, native

ARM_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
CSRC = Path(__file__).resolve().parents[3] / build.SOURCES

needs_arm_tools = pytest.mark.skipif(
    not (shutil.which(ARM_COMPILER) and shutil.which(EMULATOR)),
    reason=f"needs {ARM_COMPILER} and {EMULATOR}: apt install g++-aarch64-linux-gnu qemu-user",
)


def make_program(
    folder: Path, compiler: Sequence[str], isas: dict[str, list[str]], *flags: str
) -> Path:
    """`other_cpu.cpp` with the kernels of some instruction sets, each compiled with its flags."""
    have = [f"-DXY_HAVE_{isa.upper()}" for isa in isas if isa != "portable"]
    units = [
        *((CSRC / "kernels.cpp", isa, [*own, f"-DXY_ISA={isa}"]) for isa, own in isas.items()),
        (CSRC / "abi.cpp", "abi", have),
        (CSRC / "threads.cpp", "threads", []),
        # Its twins round where they say so.
        (Path(__file__).with_name("other_cpu.cpp"), "main", ["-ffp-contract=off"]),
    ]

    def compile(source: Path, name: str, own: list[str]) -> str:
        path = str(folder / f"{name}.o")
        run([*compiler, *build.FLAGS, "-Werror", *flags, *own, "-c", str(source), "-o", path])
        return path

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile, *zip(*units, strict=True)))
    program = folder / "other_cpu"
    run([*compiler, "-static", "-pthread", *objects, "-o", str(program)])
    return program


def run(command: list[str]) -> str:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def arm_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    isas = {"portable": [], "armv86": build.ARMV86_FLAGS}
    return make_program(tmp_path_factory.mktemp("arm"), [ARM_COMPILER], isas)


@needs_arm_tools
@pytest.mark.parametrize(("isa", "has"), [("portable", 0), ("armv86", 1)])
def test_products_on_arm_are_those_of_their_twins(arm_program: Path, isa: str, has: int) -> None:
    found = run([EMULATOR, "-cpu", "max", str(arm_program), isa])

    assert found == f"{isa}: 7 formats, bf16 dot {has}, int8 dot {has}\n"


@needs_arm_tools
def test_an_older_arm_cpu_is_not_given_what_it_lacks(arm_program: Path) -> None:
    old = [EMULATOR, "-cpu", "cortex-a72", str(arm_program)]

    assert run([*old, "portable"]).startswith("portable: 7 formats")
    assert subprocess.run([*old, "armv86"], capture_output=True).returncode == 1


@pytest.mark.skipif(
    "avx512bf16" not in native.available_isas(), reason="the twin of AMX's tiles needs AVX512_BF16"
)
def test_products_on_tiles_are_those_of_the_twin_of_amx(tmp_path: Path) -> None:
    isas = {"portable": [], "amx": build.ISA_FLAGS["avx512bf16"]}
    program = make_program(tmp_path, build.find_compiler(), isas, "-DXY_AMX_TWIN")

    assert run([str(program), "amx"]) == "amx: 7 formats, bf16 dot 1, int8 dot 1\n"
