"""What each test file needs, a fast run without all of it, and one report of a broken fixture."""

import fnmatch
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent

NEEDS = {
    "e2e": ("e2e/*",),
    "ray": (
        "e2e/*",
        "*/test_ray_*",
        "cluster/test_*",
        "cluster/ingress/*",
        "cluster/observe/test_chrome_trace.py",
        "cluster/observe/test_exporter.py",
        "cluster/placement/test_router.py",
    ),
    "vllm": (
        "e2e/*",
        "*/test_vllm_*",
        "cluster/cli/test_calibrate.py",
        "cluster/models/*",
        "workers/drafters/test_draft_head.py",
        "workers/drafters/test_head_drafter.py",
    ),
    "prometheus": ("e2e/test_prometheus.py", "cluster/observe/dashboards/test_plots.py"),
}
"""The markers, and the files below tests/ that have them."""

SLOW_IMPORTS = ("ray", "torch", "vllm")
"""What no fast test may import into the process of the tests: seconds for each."""

BROKEN = pytest.StashKey[dict[tuple[str, str], str]]()
"""Shared fixtures that failed, each with the test that reported it."""


def needs(path: Path) -> set[str]:
    """The markers of a test file or folder."""
    name = path.relative_to(TESTS).as_posix() + "/" * path.is_dir()
    return {
        marker
        for marker, patterns in NEEDS.items()
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    }


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out files that need anything slow")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave a file out before it is imported; `-m` would do so after."""
    is_left_out = config.getoption("fast") and needs(collection_path)
    return True if is_left_out else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker in needs(item.path):
            item.add_marker(marker)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _check_imports(collector)
    return report


def pytest_runtest_teardown(item: pytest.Item) -> None:
    _check_imports(item)


def _check_imports(node: pytest.Collector | pytest.Item) -> None:
    """End a fast run at the first test or file that is not fast."""
    if node.config.getoption("fast"):
        for module in SLOW_IMPORTS:
            if module in sys.modules:
                pytest.exit(
                    f"{node.nodeid} imports {module}: list its file in NEEDS of tests/conftest.py",
                    returncode=pytest.ExitCode.TESTS_FAILED,
                )


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    """Remember a shared fixture that fails; pytest would report it for each test that needs it."""
    try:
        return (yield)
    except (Exception, pytest.fail.Exception):
        if fixturedef.scope != "function" and not hasattr(request, "param"):
            test = request._pyfuncitem.nodeid
            broken = request.session.stash.setdefault(BROKEN, {})
            broken[fixturedef.baseid, fixturedef.argname] = test
        raise


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a broken fixture; the run has failed by the one report of it."""
    for (place, fixture), test in item.session.stash.get(BROKEN, {}).items():
        if item.nodeid.startswith(place) and fixture in getattr(item, "fixturenames", ()):
            pytest.skip(f"needs `{fixture}`, which failed: see the error of {test}")
