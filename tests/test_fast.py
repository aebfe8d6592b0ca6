import subprocess
import sys

import pytest


@pytest.mark.skipif("config.getoption('fast')", reason="this run checks it itself")
def test_no_fast_file_imports_what_is_slow() -> None:
    """In a process of its own, as the other files of this run have imported slow modules."""
    collect = [sys.executable, "-m", "pytest", "--fast", "--collect-only", "--quiet"]
    done = subprocess.run(collect, capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stdout[-2000:]
