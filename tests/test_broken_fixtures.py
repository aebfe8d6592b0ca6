import re
import subprocess
import sys
from pathlib import Path

TESTS = """
import pytest

@pytest.fixture(scope="session")
def server():
    pytest.fail("no server came up")

@pytest.fixture(scope="session")
def client(server):
    return server

@pytest.mark.parametrize("number", range(5))
def test_with_server(client, number):
    pass

def test_without():
    pass
"""


def test_a_shared_fixture_that_fails_is_reported_once(tmp_path: Path) -> None:
    (tmp_path / "test_server.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "tests.broken_fixtures", "-rs", str(tmp_path)]
    done = subprocess.run(
        [*command, f"--rootdir={tmp_path}", "-c", "/dev/null"], capture_output=True, text=True
    )

    assert done.returncode == 1, done.stderr
    assert "1 passed, 4 skipped, 1 error" in done.stdout
    assert len(re.findall(r"^E +Failed: no server came up$", done.stdout, re.M)) == 1
    assert (
        "needs `server`, which failed: see the error of test_server.py::test_with_server[0]"
        in done.stdout
    )
