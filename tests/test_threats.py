"""The threat model: each test, key of the config and section that it names is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
THREATS = (ROOT / "deploy" / "threats.md").read_text()
CODE = re.findall(r"`([^`]+)`", THREATS)


def sources(folder: str) -> str:
    return "\n".join(path.read_text() for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("name", [name for name in CODE if name.endswith(".py")])
def test_each_file_of_tests_is_there(name: str) -> None:
    assert [*(ROOT).glob(name), *(ROOT / "tests").rglob(name)] != []


@pytest.mark.parametrize("name", [name for name in CODE if re.fullmatch(r"test_\w+", name)])
def test_each_test_is_there(name: str) -> None:
    assert f"def {name}(" in sources("tests")


@pytest.mark.parametrize("name", [name for name in CODE if name.startswith("python -m ")])
def test_each_program_is_there(name: str) -> None:
    path = name.removeprefix("python -m ").replace(".", "/")
    assert (ROOT / f"{path}.py").exists() or (ROOT / path / "__main__.py").exists()


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)]+)\)", THREATS))
def test_each_section_is_there(link: str) -> None:
    name, _, section = link.partition("#")
    text = (ROOT / "deploy" / name).read_text()
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    assert section in [re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings]


def test_every_threat_has_a_test() -> None:
    rows = [line.split("|") for line in THREATS.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 10
    assert [row for row in rows if "test" not in row[4]] == []
