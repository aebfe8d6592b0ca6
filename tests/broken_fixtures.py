"""A plugin: a shared fixture that fails is reported once, not by each test that needs it."""

from collections.abc import Generator
from typing import Any

import pytest

BROKEN = pytest.StashKey[dict[tuple[str, str], str]]()
"""Shared fixtures that failed, by place and name, each with the test that reported it."""


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    """Note a shared fixture that fails; pytest would report it for each test that needs it."""
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
    """Skip a test that needs a broken fixture; the first report has failed the run."""
    for (place, fixture), test in item.session.stash.get(BROKEN, {}).items():
        if item.nodeid.startswith(place) and fixture in getattr(item, "fixturenames", ()):
            pytest.skip(f"needs `{fixture}`, which failed: see the error of {test}")
