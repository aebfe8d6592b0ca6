"""The READMEs: everything that they link to, run or name exists."""

import ast
import importlib.util
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
import yaml
from typer.core import TyperGroup

from cluster.cli.main import app
from cluster.config.app_config import AppConfig, parse_args
from cluster.config.serve_file import read_serve_file
from tests.clients.clients import CLIENTS
from tests.clients.run import BEGIN, END, rows
from tests.test_imports import FLOORS

ROOT = Path(__file__).resolve().parent.parent
READMES = [
    ROOT / "README.md",
    *(
        path
        for folder in ("cluster", "deploy", "scheduler", "tests", "workers")
        for path in (ROOT / folder).rglob("*.md")
    ),
]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in READMES}

FILES = [
    f"/{path.relative_to(ROOT).as_posix()}"
    for folder in ("cluster", "deploy", "scheduler", "tests", "workers")
    for path in (ROOT / folder).rglob("*.*")
]

NOT_YET = {
    "triton_attention.py",
    "triton_gemm.py",
    "vllm_cuda_attention.py",
    "vllm_cuda_linear.py",
}
"""Files that a README asks its reader to write."""

FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
XYSERVE = typer.main.get_command(app)

each_readme = pytest.mark.parametrize("name", TEXTS)


def blocks(name: str, language: str) -> list[str]:
    return [text for kind, text in FENCED.findall(TEXTS[name]) if kind == language]


def spans(name: str) -> list[str]:
    """The text in single backticks."""
    return re.findall(r"`([^`\n]+)`", FENCED.sub("", TEXTS[name]))


def commands(name: str) -> Iterator[str]:
    """Lines of shell blocks, with continued lines joined, and the text in backticks."""
    for block in blocks(name, "bash"):
        yield from block.replace("\\\n", " ").splitlines()
    yield from spans(name)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    return {slug(line.lstrip("#")) for line in FENCED.sub("", text).splitlines() if line[:1] == "#"}


def test_a_newcomer_reads_the_readme_in_five_minutes() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 200


def test_the_readme_has_no_picture_that_a_package_index_cannot_show() -> None:
    assert re.findall(r"!\[[^]]*\]\((?!https://)", TEXTS["README.md"]) == []


@each_readme
def test_every_local_link_leads_somewhere(name: str) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)

    assert broken == []


@each_readme
def test_every_file_that_is_named_exists(name: str) -> None:
    named = {span for span in spans(name) if re.fullmatch(r"[\w./-]+\.(py|h|yaml|yml)", span)}
    found = {file for file in named if any(path.endswith(f"/{file}") for path in FILES)}

    assert named - found - NOT_YET == set()


@pytest.mark.parametrize("package", ["cluster", "workers"])
def test_the_floors_are_those_that_the_import_test_holds(package: str) -> None:
    table = TEXTS[f"{package}/README.md"].partition("| floor |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (\d+) \| ([^|]*) \|", table, re.MULTILINE)
    shown = [
        (int(floor), re.sub(r"/$|\.py$", "", room))
        for floor, rooms in rows
        for room in re.findall(r"`([^`]+)`", rooms)
    ]

    assert sorted(shown) == sorted(
        (number, room) for number, floor in enumerate(FLOORS[package]) for room in floor
    )


def test_every_client_is_in_the_table_and_has_passed_its_job() -> None:
    table = TEXTS["tests/README.md"].partition(BEGIN)[2].partition(END)[0]
    passed = re.findall(r"\| ([1-9]\d* of \d+) \|$", table, re.MULTILINE)

    assert [words for words in passed if len(set(words.split(" of "))) > 1] == []
    names = [client.name for client in CLIENTS]
    assert table.strip() == rows(dict(zip(names, passed, strict=True))).strip()


def test_every_job_of_a_client_is_run_and_none_by_plain_pytest() -> None:
    jobs = {
        path.name
        for path in (ROOT / "tests" / "clients").iterdir()
        if re.search(r"^(def test_|test\(| +test\()", path.read_text(), re.MULTILINE)
    }

    assert jobs == {client.file for client in CLIENTS}
    assert not any(job.startswith("test_") for job in jobs)


@each_readme
def test_every_make_target_exists(name: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {make for line in commands(name) for make in re.findall(r"^make [a-z-]+", line)}

    assert named - {f"make {target}" for target in targets} == set()


@each_readme
def test_every_xyserve_command_and_option_exists(name: str) -> None:
    lines = [
        re.sub(r"^(\$ )?(\.venv/bin/)?", "", line)
        for line in (*commands(name), *"".join(blocks(name, "")).splitlines())
    ]

    assert [fault for line in lines if line.startswith("xyserve ") for fault in faults(line)] == []


def faults(line: str) -> Iterator[str]:
    """Unknown commands and options of a command line; `a|b` stands for several commands."""
    _, *words = shlex.split(line, comments=True)
    found = [XYSERVE]
    for word in words:
        if word.startswith("--"):
            known = {option for one in found for param in one.params for option in param.opts}
            if word.partition("=")[0] not in {*known, "--help"}:
                yield f"{line}: {word}"
        elif isinstance(found[0], TyperGroup):
            group = found[0]
            chosen = [group.commands.get(each) for each in word.split("|")]
            if None in chosen:
                yield f"{line}: {word}"
                return
            found = [each for each in chosen if each]


@each_readme
def test_every_module_that_is_run_exists(name: str) -> None:
    modules = {
        module for line in commands(name) for module in re.findall(r"python -m ([\w.]+)", line)
    }
    missing = {module for module in modules if not importlib.util.find_spec(module)}

    assert missing - {"tests.bench.NAME"} == set()


@each_readme
def test_every_python_example_can_be_read(name: str) -> None:
    for block in blocks(name, "python"):
        ast.parse(block)


@each_readme
def test_every_piece_of_config_is_accepted(name: str, tmp_path: Path) -> None:
    for block in blocks(name, "yaml"):
        args = yaml.safe_load(textwrap.dedent(block))
        if "applications" in args:
            (tmp_path / "app.yaml").write_text(block)
            read_serve_file(tmp_path / "app.yaml")
        elif args.keys() <= AppConfig.__dataclass_fields__.keys():
            parse_args(args)
        else:
            assert args.keys() == {"deployments"}
