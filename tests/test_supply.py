"""What comes from others: the hashes of its files, and what is said of its vulnerabilities."""

import re
from typing import Any

import pytest

from tests.programs import load_script

ASKED = ["click==8.5.1", "torch==2.13.0"]
SAFE = {"name": "click", "version": "8.5.1", "vulns": []}
UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found on PyPI"}
UNSAFE = {
    "name": "torch",
    "version": "2.13.0",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.13.1"], "aliases": [], "description": ""}],
}


@pytest.fixture
def supply() -> Any:
    """The module `deploy/supply.py`, which is in no package."""
    return load_script("supply")


def wheel(tags: str) -> str:
    return f"click-8.5.1-{tags}.whl"


@pytest.mark.parametrize(
    ("tags", "is_ours"),
    [
        ("py3-none-any", True),
        ("py2.py3-none-any", True),
        ("cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64", True),
        ("cp314-cp314-manylinux_2_28_aarch64", True),
        ("cp39-abi3-manylinux2014_aarch64", True),
        ("cp310-cp310-manylinux_2_28_x86_64", False),
        ("cp315-cp315-manylinux_2_28_x86_64", False),
        ("cp314-cp314t-manylinux_2_28_x86_64", False),
        ("cp312-cp312-musllinux_1_2_x86_64", False),
        ("cp312-cp312-macosx_14_0_arm64", False),
        ("cp312-cp312-win_amd64", False),
        ("cp312-cp312-manylinux_2_28_s390x", False),
    ],
)
def test_wheels_of_our_pythons_and_machines_are_pinned(
    supply: Any, tags: str, is_ours: bool
) -> None:
    assert supply.ours("click==8.5.1", {wheel(tags): "abc"}) == ["sha256:abc"] * is_ours


def test_a_pin_of_one_machine_needs_no_wheel_for_another(
    supply: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pin = 'click==8.5.1 ; platform_machine == "x86_64"'
    wheels = {wheel("py3-none-manylinux2014_x86_64"): "a", wheel("py3-none-linux_aarch64"): "b"}

    assert supply.ours(pin, wheels) == ["sha256:a"]
    assert capsys.readouterr().out == ""


def test_a_machine_without_a_wheel_is_named(
    supply: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    supply.ours("click==8.5.1", {wheel("py3-none-manylinux2014_x86_64"): "a"})

    assert "click==8.5.1 has no wheel for Python 3.14 on aarch64" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["PINS", "TOOL_PINS"])
def test_every_pin_has_a_hash(supply: Any, file: str) -> None:
    lines = getattr(supply, file).read_text().replace("\\\n", " ").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]

    assert len(pins) > 40
    assert [pin for pin in pins if not re.search(r"==.* --hash=sha256:[0-9a-f]{64}$", pin)] == []


def test_vulnerabilities_are_asked_for_by_the_names_under_which_they_are_reported(
    supply: Any,
) -> None:
    asked = supply.audited(supply.PINS.read_text())

    assert {"vllm==0.32.0", "torch==2.13.0", "intel-openmp==2024.2.1"} <= set(asked)
    assert not any("+" in pin or ";" in pin for pin in asked)


@pytest.mark.parametrize(
    ("found", "status", "words"),
    [
        ([SAFE, {**UNSAFE, "vulns": []}], 0, "2 of 2 packages audited"),
        ([SAFE, UNSAFE], 1, "torch 2.13.0: PYSEC-1, repaired in 2.13.1"),
        ([SAFE, UNKNOWN], 3, "NOT AUDITED: of 1 of 2 packages (torch)"),
        ([], 3, "NOT AUDITED: of 2 of 2 packages (click, torch)"),
    ],
)
def test_a_package_of_which_nothing_is_known_is_not_called_safe(
    supply: Any, found: list[dict[str, Any]], status: int, words: str
) -> None:
    got = supply.judge({"dependencies": found}, ASKED)

    assert got[0] == status
    assert words in got[1]
