"""A short chaos: no request suffers while replicas of all kinds die."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MIN_KILLS = 5


@pytest.mark.timeout(900)
def test_no_request_suffers_while_replicas_die_and_nothing_is_left_behind(tmp_path: Path) -> None:
    """In a process of its own: one can be connected to one Ray cluster only."""
    out = tmp_path / "summary.json"
    command = [sys.executable, "-m", "tests.chaos", "--json", str(out), "--seed", "1"]
    short = ["--minutes", "0.7", "--kills", str(MIN_KILLS), "--variants", "1", "--clients", "4"]

    ran = subprocess.run([*command, *short], capture_output=True, text=True)

    assert out.exists(), ran.stdout[-4000:] + ran.stderr[-4000:]
    summary = json.loads(out.read_text())
    sorts = ("lost", "doubled", "unequal", "failed", "leaks")
    assert {sort: summary[sort] for sort in sorts} == dict.fromkeys(sorts, 0), summary
    assert summary["kills"] >= MIN_KILLS
    assert summary["requests"] > 0
