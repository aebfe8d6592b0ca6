"""Markers for what each test file needs, and fast runs without those files."""

import fnmatch
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

pytest_plugins = ["tests.broken_fixtures"]

TESTS = Path(__file__).parent

NEEDS = {
    "e2e": ("e2e/*", "nodes/*"),
    "ray": (
        "e2e/*",
        "nodes/*",
        "*/test_ray_*",
        "cluster/test_*",
        "cluster/ingress/*",
        "cluster/cli/test_launch.py",
        "cluster/cli/test_trace.py",
        "cluster/observe/test_app_metrics.py",
        "cluster/observe/test_exporter.py",
        "cluster/placement/test_router.py",
        "cluster/placement/test_scaling_policy.py",
    ),
    "vllm": (
        "e2e/*",
        "nodes/*",
        "*/test_vllm_*",
        "cluster/cli/test_calibrate.py",
        "cluster/models/*",
        "workers/drafters/test_draft_head.py",
        "workers/drafters/test_head_drafter.py",
    ),
    "arm": ("workers/kernels/test_other_cpu.py",),
    "fronts": ("deploy/test_fronts.py", "e2e/test_tls_front.py"),
    "pip": ("test_install.py",),
    "prometheus": (
        "e2e/test_prometheus.py",
        "cluster/observe/dashboards/test_alerts.py",
        "cluster/observe/dashboards/test_plots.py",
    ),
}
"""Markers, each with the files below tests/ that have it."""

SLOW_IMPORTS = ("ray", "torch", "vllm")
"""Modules that no fast test may import: each takes seconds."""


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
    parser.addoption(
        "--server", type=Path, help="JSON file of the running server that tests/e2e is to test"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave a file out before it is imported; `-m` would import it first."""
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
