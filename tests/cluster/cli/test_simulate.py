import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.cli.main import app, main
from cluster.errors import XYServeError


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "run.jsonl"
    rows = (
        {"arrival_s": i / 10, "input_length": 500, "output_length": 20, "class": "ab"[i % 2]}
        for i in range(40)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def simulate(*args: object) -> Result:
    return CliRunner().invoke(app, ["simulate", *map(str, args)])


def cells(output: str) -> dict[str, list[str]]:
    lines = (line.strip("│") for line in output.splitlines() if line.startswith("│"))
    rows = ([cell.strip() for cell in line.split("│")] for line in lines)
    return {name: values for name, *values in rows}


def test_policies_stand_side_by_side(trace: Path) -> None:
    result = simulate(
        trace, "--policy", "hybrid", "--policy", "static", "--ttft-ms", 500, "--tpot-ms", 50
    )

    rows = cells(result.stdout)
    assert result.exit_code == 0
    assert "40 requests on 1 x h200-llama-3-8b (modelled)" in " ".join(result.stdout.split())
    assert rows["within both targets"] == ["100.0%", "100.0%"]
    assert rows["requests/s offered"] == ["10.26", "10.26"]
    assert rows["a"] == rows["b"] == ["100.0%", "100.0%"]


def test_without_a_policy_all_are_compared(trace: Path) -> None:
    result = simulate(trace, "--requests", 3)

    assert len(cells(result.stdout)["requests/s"]) == 4


def test_equal_arguments_give_equal_output(trace: Path) -> None:
    args = (trace, "--noise", 0.2, "--seed", 3, "--drafts", 3, "--workers", 2)

    assert simulate(*args).stdout == simulate(*args).stdout
    assert simulate(*args).stdout != simulate(*args, "--seed", 4).stdout


def test_each_load_is_a_row(trace: Path) -> None:
    result = simulate(trace, "--policy", "hybrid", "--load", "0.5,1,2")

    rows = cells(result.stdout)
    offered = [rows[name][0] for name in ("hybrid x0.5", "hybrid", "hybrid x2")]
    assert offered == ["5.13", "10.26", "20.51"]


def test_the_figures_are_written_as_json(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"

    result = simulate(trace, "--policy", "static", "--ttft-ms", 1000, "--json", path)

    state = json.loads(path.read_text())
    (run,) = state["runs"]
    assert f"Figures: {path}" in result.stdout
    assert state["device"] == "h200-llama-3-8b"
    assert run["policy"] == "static"
    assert run["summary"]["num_requests"] == len(run["requests"]) == 40
    assert run["requests"][0]["slo"] == {"ttft_s": 1.0, "tpot_s": None}
    assert run["by_class"].keys() == {"a", "b"}


def test_plots_are_drawn(trace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "plots"

    result = simulate(trace, "--policy", "hybrid", "--load", "1,2", "--plot", folder)

    assert result.exit_code == 0
    assert {path.name for path in folder.iterdir()} == {
        "latencies.png",
        "timeline-hybrid.png",
        "timeline-hybrid-x2.png",
        "goodput.png",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())


def test_a_part_of_the_trace_can_be_taken(trace: Path) -> None:
    assert "10 requests" in simulate(trace, "--policy", "static", "--duration", 0.95).stdout
    assert "7 requests" in simulate(trace, "--policy", "static", "--requests", 7).stdout


def test_a_rate_scales_the_times(trace: Path) -> None:
    result = simulate(trace, "--policy", "static", "--rate", 2)

    assert cells(result.stdout)["requests/s offered"] == ["20.51"]


def test_the_devices_are_listed() -> None:
    result = CliRunner().invoke(app, ["simulate", "--list-devices"])

    assert result.exit_code == 0
    assert "measured" in cells(result.stdout)["cpu-avx512-smollm2-135m"]
    assert "modelled" in cells(result.stdout)["h200-llama-3-8b"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--policy", "fifo"], "no policy 'fifo'; use one of hybrid, static"),
        (["--device", "abacus"], "no device profile 'abacus'; use one of a800"),
        (["--load", "1,x"], "--load 1,x must be positive numbers"),
        (["--load", "0"], "--load 0 must be positive numbers"),
        (["--ttft-ms", "0"], "must be positive"),
        (["--rate", "0"], "must be positive"),
        (["--duration", "0"], "no requests left"),
        (["--json", "/nowhere/x.json"], "cannot write /nowhere/x.json"),
    ],
)
def test_a_simulation_that_is_not_possible_is_one_line_with_a_remedy(
    args: list[str], message: str, trace: Path
) -> None:
    result = simulate(trace, *args)

    assert result.exit_code == 1
    assert isinstance(result.exception, XYServeError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


def test_a_missing_trace_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["xyserve", "simulate", "gone.csv"])

    with pytest.raises(SystemExit) as exit_info:
        main()

    assert exit_info.value.code == 1
    assert "error: gone.csv: no such file" in capsys.readouterr().err


def test_the_help_has_examples() -> None:
    result = CliRunner().invoke(app, ["simulate", "--help"])

    assert "Example: xyserve simulate azure_2023_conv.csv" in result.stdout
