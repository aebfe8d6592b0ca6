"""Programs and files outside of our packages that tests use: how they are found, run and loaded."""

import importlib.util
import os
import shutil
import socket
from types import ModuleType

import pytest

from tests.test_imports import ROOT


def require(program: str, package: str) -> str:
    """The path of a program of a Debian package; without it a test is skipped, and fails in CI."""
    # Debian keeps some where the path of users does not lead.
    path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if path is None:
        reason = f"{program} is not on PATH (on Debian: apt-get install {package})"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def free_port() -> int:
    """A TCP port of this machine that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def load_script(name: str) -> ModuleType:
    """The module `deploy/NAME.py`, which is in no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "deploy" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
