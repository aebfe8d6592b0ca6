import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cluster.cli.main import app
from tests.workers.tiny_models import write_checkpoint
from workers.kernels import calibration, native, tile_table
from workers.kernels.tile_table import Inputs, TileTable, built_in_table, max_height, tile_costs
from workers.kernels.tiles import TileCosts, row_tiles

HEIGHT = native.kernels().max_height

FLAT: TileTable = {inputs: TileCosts((1.0,) * max_height(inputs)) for inputs in Inputs}
"""Each tile costs the same, so that as few as possible are best."""

WITHOUT_LIBRARY = """
import ctypes, sys
def refuse(name, *args, load=ctypes.CDLL, **options):
    if name.endswith("libxykernels.so"):
        raise OSError(f"{name}: cannot open shared object file")
    return load(name, *args, **options)
ctypes.CDLL = refuse
sys.argv = ["xyserve", "calibrate", "--kernels-only"]
from cluster.cli.main import main
main()
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for the cache and for claims of cores, in place of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # a running server may have claimed every core
    tile_table._in_use.cache_clear()
    yield tmp_path
    tile_table._in_use.cache_clear()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[TileTable]:
    """Results of measuring, one for each call, without the time it takes."""
    found = [FLAT]

    def measure(progress: Callable[[float], None]) -> TileTable:
        progress(1.0)
        return found.pop(0)

    monkeypatch.setattr(calibration, "measure", measure)
    return found


def in_use() -> TileTable:
    return {inputs: tile_costs(inputs) for inputs in Inputs}


def sums(num_rows: int, *tables: TileTable) -> list[str]:
    """A row of the second table: what the tables lead to for some rows."""
    cuts = [
        " + ".join(map(str, row_tiles(num_rows, table[inputs])))
        for inputs in Inputs
        for table in tables
    ]
    return [str(num_rows), *cuts]


def cells(output: str) -> list[list[str]]:
    """The rows of the printed tables."""
    lines = [line for line in output.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_it_shows_the_built_in_table_next_to_the_measured_one(measured: list[TileTable]) -> None:
    result = CliRunner().invoke(app, ["calibrate", "--kernels-only"])

    built_in = built_in_table()

    def cost(table: TileTable, inputs: Inputs, height: int) -> str:
        costs, tallest = table[inputs].of_height, table[Inputs.FLOAT32].of_height[-1]
        return f"{costs[height - 1] / tallest * HEIGHT:.2f}" if height <= len(costs) else ""

    heights = [
        [str(height), *(cost(t, inputs, height) for inputs in Inputs for t in (built_in, FLAT))]
        for height in range(1, HEIGHT + 1)
    ]
    cuts = [sums(num_rows, built_in, FLAT) for num_rows in (7, 8, 16, 31, 33)]
    assert result.exit_code == 0
    assert cells(result.stdout) == heights + cuts
    assert "built-in" in result.stdout
    assert f"Written to {tile_table.path()}" in result.stdout
    assert in_use() == FLAT


def test_a_second_time_it_only_shows_what_was_measured(measured: list[TileTable]) -> None:
    CliRunner().invoke(app, ["calibrate", "--kernels-only"])

    again = CliRunner().invoke(app, ["calibrate", "--kernels-only"])

    assert again.exit_code == 0
    assert cells(again.stdout)[-1] == sums(33, FLAT)
    assert f"Measured before: {tile_table.path()}" in again.stdout
    assert "xyserve calibrate --force" in again.stdout


def test_force_measures_again(measured: list[TileTable]) -> None:
    rising = {
        inputs: TileCosts(tuple(float(height) for height in range(1, max_height(inputs) + 1)))
        for inputs in Inputs
    }
    measured.append(rising)
    CliRunner().invoke(app, ["calibrate", "--kernels-only"])

    forced = CliRunner().invoke(app, ["calibrate", "--kernels-only", "--force"])

    assert forced.exit_code == 0
    assert cells(forced.stdout)[-1] == sums(33, FLAT, rising)
    assert "before" in forced.stdout
    assert in_use() == rising


def test_a_damaged_table_is_measured_again_without_force(measured: list[TileTable]) -> None:
    tile_table.path().parent.mkdir(parents=True)
    tile_table.path().write_text("{")

    result = CliRunner().invoke(app, ["calibrate", "--kernels-only"])

    assert result.exit_code == 0
    assert "built-in" in result.stdout
    assert in_use() == FLAT


def test_a_cache_folder_that_takes_no_file_is_an_error(
    measured: list[TileTable], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "file"))

    result = CliRunner().invoke(app, ["calibrate", "--kernels-only"])

    assert (result.exit_code, result.stdout) == (1, "")
    assert f"Error: cannot write {tile_table.path()}" in result.stderr
    assert "XYSERVE_HOME" in result.stderr


def test_without_the_library_it_says_how_to_build_it() -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBRARY], capture_output=True, text=True, timeout=60
    )

    assert (result.returncode, result.stdout) == (1, "")
    assert "Error: the native kernels cannot be loaded" in result.stderr
    assert "make install" in result.stderr
    assert "Traceback" not in result.stderr


def write_config(path: Path, model: Path) -> Path:
    worker = {
        "engine": {
            "max_num_seqs": 4,
            "max_num_batched_tokens": 64,
            "max_model_len": 256,
            "kv_cache_gib": 0.01,
            "block_size": 32,
            "extra_args": {"skip_tokenizer_init": True},
        }
    }
    app = {"import_path": "cluster.app:build_app", "args": {"model": str(model), "worker": worker}}
    path.write_text(yaml.safe_dump({"applications": [app]}))
    return path


def test_it_measures_the_steps_of_a_configs_engine_once(
    measured: list[TileTable], tmp_path: Path
) -> None:
    write_checkpoint("llama", tmp_path / "llama")
    config = str(write_config(tmp_path / "config.yaml", tmp_path / "llama"))

    first = CliRunner().invoke(app, ["calibrate", config])
    again = CliRunner().invoke(app, ["calibrate", config])

    assert first.exit_code == again.exit_code == 0
    [path] = (tmp_path / "xyserve" / "calibration").glob("engine-llama-*.json")
    assert f"Written to {path}" in first.stdout
    assert f"Measured before: {path}" in again.stdout
    title = "Steps that the cost model was not fitted to: 12 of 40"
    assert (
        first.stdout.partition(title)[2].splitlines()[:16]
        == (again.stdout.partition(title)[2].splitlines()[:16])
    )
    assert "Median error: " in first.stdout
    assert re.search(r"Peak rates measured: [\d.]+ GFLOP/s, [\d.]+ GB/s\n", first.stdout)
    assert len([row for row in cells(first.stdout) if row[-1].endswith("%")]) == 12


def test_an_engine_that_does_not_start_is_an_error(
    measured: list[TileTable], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    config = write_config(tmp_path / "config.yaml", tmp_path / "empty")

    result = CliRunner().invoke(app, ["calibrate", str(config)])

    assert result.exit_code == 1
    assert f"Error: the engine of {config} cannot be measured: " in result.stderr
    assert not list(tmp_path.rglob("engine-*"))
