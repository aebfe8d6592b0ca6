"""The build of the C++ kernels into one library that ctypes loads, alone or as a part of a wheel.

`python -m workers.kernels.build` builds it in the source tree. For wheels, editable installs and
source distributions pyproject.toml names the commands below, which need setuptools; nothing that
runs later does, and nothing here needs an installed package of ours.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Command, Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info

# From the root of a checkout or source distribution, where every build starts.
SOURCES = Path("workers/kernels/csrc")
LIBRARY = "workers.kernels.libxykernels"
KERNELS = "kernels.cpp"
# Not setuptools' build_temp: an editable install throws that away, and every object with it.
OBJECTS = Path("build/kernels")

# -ffp-contract=fast allows fused multiply-adds. -ffast-math would also allow sums in another order,
# and a row's bits would depend on the compiler; -march=native would tie a wheel to one machine.
FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-Wall", "-Wextra"]
FLAGS += ["-fPIC", "-fvisibility=hidden", "-pthread"]
# A missing function is an error of the build, not of the first process that loads the library.
LINK_FLAGS = ["-shared", "-pthread", "-Wl,--no-undefined"]

# From the weakest to the strongest, which is also the order of linking: of an inline function that
# several objects hold, the linker keeps the first, and every CPU must be able to run that one.
ISA_FLAGS: dict[str, list[str]] = {"portable": []}
ARMV86_FLAGS = ["-march=armv8.6-a"]  # Neoverse V1 and N2: bfdot and usdot
if platform.machine() == "x86_64":
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avxvnni"] = [*ISA_FLAGS["avx2"], "-mavxvnni"]
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
    ISA_FLAGS["avx512vnni"] = [*ISA_FLAGS["avx512"], "-mavx512vnni"]
    ISA_FLAGS["avx512bf16"] = [*ISA_FLAGS["avx512vnni"], "-mavx512bf16"]
    ISA_FLAGS["amx"] = [*ISA_FLAGS["avx512bf16"], "-mamx-tile", "-mamx-bf16"]
elif (platform.system(), platform.machine()) == ("Linux", "aarch64"):
    ISA_FLAGS["armv86"] = ARMV86_FLAGS

NEEDED = "The kernels need GCC 11 or newer: apt install g++, or dnf install gcc-c++"


class SourceList(egg_info):
    """Declares the kernels as an extension, so that a source distribution holds their sources."""

    def initialize_options(self) -> None:
        """Declare them before setuptools collects the files."""
        declare_kernels(self)
        super().initialize_options()


class PlatformWheel(bdist_wheel):
    """Tags the wheel for the platform and for every Python 3."""

    def initialize_options(self) -> None:
        """Declare the kernels before setuptools decides what kind of wheel it makes."""
        declare_kernels(self)
        super().initialize_options()

    def get_tag(self) -> tuple[str, str, str]:
        """Keep only the platform of the tag."""
        return ("py3", "none", super().get_tag()[2])


class BuildKernels(build_ext):
    """Builds the one extension as a plain shared library: no Python headers, no Python's suffix."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name the library without the version of Python, which it does not depend on."""
        return str(library_path(fullname))

    def build_extension(self, ext: Extension) -> None:
        """Build by our own rules: setuptools compiles each source once, with the same flags."""
        build_library(Path(self.get_ext_fullpath(ext.name)))


def declare_kernels(command: Command) -> None:
    """Add the extension to the project; in pyproject.toml itself that is still experimental."""
    command.distribution.ext_modules = [
        Extension(
            LIBRARY,
            # What a source distribution holds.
            sources=[str(path) for path in source_files("*.cpp")],
            depends=[str(path) for path in source_files("*.h")],
        )
    ]


def library_path(name: str) -> Path:
    """Path of the library of a dotted name, below the root or a build folder."""
    return Path(*name.split(".")).with_suffix(".so")


def build_library(library: Path) -> None:
    """Compile in parallel what has changed since the objects were made, and link."""
    compiler = find_compiler()
    commands = compile_commands(compiler)
    OBJECTS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # The longest first: the widest instructions come last in the order of linking.
        list(pool.map(run_unless_made, reversed(commands.values()), reversed(commands)))
    library.parent.mkdir(parents=True, exist_ok=True)
    run([*compiler, *LINK_FLAGS, *map(str, commands)], library)
    for stale in set(OBJECTS.iterdir()) - set(commands):
        stale.unlink(missing_ok=True)


def find_compiler() -> list[str]:
    """Take $CXX, which may be several words (`ccache g++`), or the first usual name that exists."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if shutil.which(shlex.split(name)[0]):
            return shlex.split(name)
    raise SystemExit(f"No C++ compiler found ({', '.join(names)}). {NEEDED}")


def compile_commands(compiler: list[str]) -> dict[Path, list[str]]:
    """Map each object, in the order of linking, to the command that makes it, without its output.

    An object's name is a hash of all it is made of, so one that exists is up to date,
    whatever a checkout or a copy has done to the times of the files.
    """
    version = subprocess.run([*compiler, "--version"], capture_output=True).stdout
    headers = [path.name.encode() + path.read_bytes() for path in source_files("*.h")]
    commands = {}
    for source, variant, flags in variants():
        command = [*compiler, *FLAGS, *flags, "-c", str(source)]
        made_of = [version, *headers, source.read_bytes(), shlex.join(command).encode()]
        digest = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:16]
        commands[OBJECTS / f"{source.stem}{variant}-{digest}.o"] = command
    return commands


def variants() -> Iterator[tuple[Path, str, list[str]]]:
    """Each source, the suffix of its object and its own flags; kernels.cpp once for each ISA."""
    have = [f"-DXY_HAVE_{isa.upper()}" for isa in ISA_FLAGS if isa != "portable"]
    for source in source_files("*.cpp"):
        if source.name != KERNELS:
            yield source, "", have
    for isa, flags in ISA_FLAGS.items():
        yield SOURCES / KERNELS, f"-{isa}", [*flags, f"-DXY_ISA={isa}"]


def source_files(pattern: str) -> list[Path]:
    """List the sources or the headers, always in the same order."""
    return sorted(SOURCES.glob(pattern))


def run_unless_made(command: list[str], output: Path) -> None:
    """Run a command whose output does not exist yet."""
    if not output.exists():
        run(command, output)


def run(command: list[str], output: Path) -> None:
    """Run a compiler; its output takes its name when it is whole, also if the build is cut off."""
    unfinished = output.with_suffix(".unfinished")
    command = [*command, "-o", str(unfinished)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(shlex.join(command), result.stdout, sep="\n", end="", flush=True)
    if result.returncode != 0:
        raise SystemExit(f"The C++ kernels did not compile; the reason is above. {NEEDED}")
    unfinished.replace(output)


if __name__ == "__main__":
    build_library(library_path(LIBRARY))
