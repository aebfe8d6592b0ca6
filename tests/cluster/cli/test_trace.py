from pathlib import Path

from typer.testing import CliRunner

from cluster.cli.main import app


def test_a_trace_that_could_not_be_written_is_not_recorded(tmp_path: Path) -> None:
    out = tmp_path / "missing" / "trace.json"

    result = CliRunner().invoke(app, ["trace", "--out", str(out)])

    assert result.exit_code == 1
    assert "there is no folder" in result.output
