from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli.main import app
from scheduler.policy import StepPolicy
from tests.scheduler.records import steady, tampered, write
from tests.scheduler.scenes import LIMITS


@pytest.fixture
def lines() -> list[str]:
    written, _ = write(StepPolicy(), LIMITS, steady())
    return written


def replay(path: Path, lines: list[str]) -> tuple[int, str]:
    path.write_text("\n".join(lines) + "\n")
    result = CliRunner().invoke(app, ["replay", str(path)])
    return result.exit_code, result.output


def test_a_replay_counts_equal_plans_and_errors(tmp_path: Path, lines: list[str]) -> None:
    code, output = replay(tmp_path / "record.jsonl", lines)

    assert code == 0
    assert "steps            10\nequal plans      10\n" in output
    assert "in the median step" in output
    assert "difference" not in output


def test_the_first_difference_is_shown(tmp_path: Path, lines: list[str]) -> None:
    path = tmp_path / "record.jsonl"

    code, output = replay(path, tampered(lines, 4, {"predicted_s": 0.25}))

    assert code == 1
    assert "equal plans      9\n" in output
    assert "first difference in step 4\n  recorded BatchPlan(" in output
    assert "predicted_s=0.25" in output


def test_what_is_no_record_is_one_line(tmp_path: Path) -> None:
    code, output = replay(tmp_path / "x.jsonl", ["nothing"])

    assert code == 1
    assert output.startswith("Error: ")
    assert output.count("\n") == 1
    assert "is not a record that can be replayed" in output
