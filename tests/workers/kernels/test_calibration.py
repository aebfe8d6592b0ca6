import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from workers.kernels import calibration, native, tile_table
from workers.kernels.calibration import measure
from workers.kernels.tile_table import (
    Inputs,
    TileTable,
    built_in_table,
    fastest,
    is_measured,
    max_height,
    save,
    tile_costs,
)
from workers.kernels.tiles import TileCosts

HEIGHT = max_height(Inputs.BF16)

MEASURED = {
    inputs: TileCosts(tuple(float(10 * of + height) for height in range(max_height(inputs))))
    for of, inputs in enumerate(Inputs, 1)
}


def in_use() -> TileTable:
    return {inputs: tile_costs(inputs) for inputs in Inputs}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, in place of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tile_table._in_use.cache_clear()
    yield tmp_path
    tile_table._in_use.cache_clear()


@pytest.fixture
def portable() -> Iterator[None]:
    native.use_isa("portable")
    yield
    native.use_isa(native.available_isas()[0])


def write(**changed: object) -> None:
    """A file as `save` writes it, with some of its values changed."""
    save(MEASURED)
    document = json.loads(tile_table.path().read_text()) | changed
    tile_table.path().write_text(json.dumps(document))
    tile_table._in_use.cache_clear()


def test_nothing_measured_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    assert (in_use(), is_measured()) == (built_in_table(), False)
    assert caplog.messages == []


def test_what_is_saved_is_used_at_once_and_later(cache: Path) -> None:
    assert not is_measured()

    save(MEASURED)

    assert (in_use(), is_measured()) == (MEASURED, True)
    tile_table._in_use.cache_clear()  # as in another process
    assert (in_use(), is_measured()) == (MEASURED, True)


def test_a_later_measurement_replaces_the_file_and_leaves_no_other(cache: Path) -> None:
    save(built_in_table())
    save(MEASURED)

    assert in_use() == MEASURED
    assert [file for file in cache.rglob("*") if file.is_file()] == [tile_table.path()]


def test_the_file_is_found_in_the_home_folder_without_xdg(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))

    assert tile_table.path().parent == tmp_path / ".cache" / "xyserve" / "calibration"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "7", '"tile_costs"', "\0", "\xff\xfe"],
    ids=["empty", "cut off", "a list", "null", "a number", "a string", "a zero", "no text"],
)
def test_a_damaged_file_is_named_once_and_left_out(
    content: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(MEASURED)
    tile_table.path().write_bytes(content.encode("latin-1"))
    tile_table._in_use.cache_clear()

    assert (in_use(), is_measured()) == (built_in_table(), False)
    assert in_use() == built_in_table()
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert vars(record)["file"] == str(tile_table.path())
    assert "xyserve calibrate" in record.message


@pytest.mark.parametrize(
    "costs",
    [
        None,
        7,
        "1" * HEIGHT,
        [1.0] * (HEIGHT - 1),
        [1.0] * (HEIGHT + 1),
        [0.0] * HEIGHT,
        [-1.0] * HEIGHT,
        [float("nan")] * HEIGHT,
        [float("inf")] * HEIGHT,
        ["fast"] * HEIGHT,
        [None] * HEIGHT,
    ],
    ids=str,
)
def test_costs_that_cannot_be_are_left_out(costs: object, caplog: pytest.LogCaptureFixture) -> None:
    of_all = json.loads(json.dumps({of: [1.0] * max_height(of) for of in Inputs}))
    write(tile_costs=of_all | {"bf16": costs})

    assert (in_use(), is_measured()) == (built_in_table(), False)
    [record] = caplog.records
    assert f"tile_costs of bf16 are not {HEIGHT} positive numbers" in vars(record)["error"]


@pytest.mark.parametrize("costs", [None, [1.0] * HEIGHT, {}, {"bf16": [1.0] * HEIGHT}])
def test_costs_of_some_inputs_only_are_left_out(
    costs: object, caplog: pytest.LogCaptureFixture
) -> None:
    write(tile_costs=costs)

    assert (in_use(), is_measured()) == (built_in_table(), False)
    [record] = caplog.records
    assert "not those of float32, bf16, int8" in vars(record)["error"]


@pytest.mark.parametrize("isa", native.available_isas())
def test_without_measurement_an_instruction_decides_what_is_fastest(isa: str) -> None:
    native.use_isa(isa)
    try:
        kernels = native.kernels()

        assert fastest(*Inputs) == (
            Inputs.INT8
            if kernels.has_int8_dot
            else Inputs.BF16
            if kernels.has_bf16_dot
            else Inputs.FLOAT32
        )
        assert (kernels.has_bf16_dot, kernels.has_int8_dot) == (
            isa in ("amx", "avx512bf16", "armv86"),
            isa in ("amx", "avx512bf16", "avx512vnni", "avxvnni", "armv86"),
        )
    finally:
        native.use_isa(native.available_isas()[0])


def test_what_was_measured_decides_what_is_fastest() -> None:
    save(MEASURED)

    assert fastest(*Inputs) == Inputs.FLOAT32
    assert fastest(Inputs.INT8, Inputs.BF16) == Inputs.BF16


@pytest.mark.parametrize("foreign", [{"cpu": "Another 9000"}, {"isa": "another"}, {"cpu": None}])
def test_the_costs_of_another_machine_are_left_out(
    foreign: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    write(**foreign)

    assert (in_use(), is_measured()) == (built_in_table(), False)
    [key] = foreign
    [record] = caplog.records
    assert f"its {key} is" in vars(record)["error"]


def test_a_file_that_cannot_be_read_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    tile_table.path().mkdir(parents=True)

    assert not is_measured()
    assert len(caplog.records) == 1


def test_each_instruction_set_has_its_own_costs(request: pytest.FixtureRequest) -> None:
    if native.isa() == "portable":
        pytest.skip("this CPU's best instruction set is the portable one")
    save(MEASURED)
    own = tile_table.path()

    request.getfixturevalue("portable")

    assert tile_table.path() != own
    assert (in_use(), is_measured()) == (built_in_table(), False)


def test_another_cpu_has_a_file_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    own = tile_table.path()
    monkeypatch.setattr(tile_table, "cpu", lambda: "Fast/Slow CPU @ 3 GHz")

    assert tile_table.path() != own
    assert tile_table.path().parent == own.parent


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure for a moment only: no test relies on the times."""
    monkeypatch.setattr(calibration, "MIN_ROUNDS", 2)
    monkeypatch.setattr(calibration, "MAX_ROUNDS", 3)
    monkeypatch.setattr(calibration, "ROWS", 2 * HEIGHT)


@pytest.mark.usefixtures("quick")
def test_each_height_is_measured_and_can_be_saved(cache: Path) -> None:
    costs = measure()

    assert {inputs: table.max_height for inputs, table in costs.items()} == {
        inputs: max_height(inputs) for inputs in Inputs
    }
    assert all(cost > 0 for table in costs.values() for cost in table.of_height)
    assert not any(cache.iterdir())

    save(costs)

    assert is_measured()
    for inputs, table in costs.items():
        assert tile_costs(inputs).of_height == pytest.approx(table.of_height, abs=0.01)


@pytest.mark.usefixtures("quick")
def test_measuring_reports_progress() -> None:
    shares: list[float] = []

    measure(shares.append)

    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] == 1


@pytest.mark.usefixtures("quick")
def test_measuring_uses_one_thread_and_gives_the_others_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    native.set_num_threads(2)
    seen: set[int] = set()

    measure(lambda share: seen.add(native.num_threads()))

    assert (seen, native.num_threads()) == ({1}, 2)
    native.set_num_threads(1)


@pytest.mark.usefixtures("quick", "portable")
def test_the_portable_kernels_are_measured_too() -> None:
    assert set(measure()) == set(Inputs)


def test_measuring_ends_when_its_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MIN_ROUNDS", 2)
    monkeypatch.setattr(calibration, "BUDGET_S", 1e-9)
    shares: list[float] = []

    measure(shares.append)

    assert shares == pytest.approx([1 / 6, 1 / 3, 1 / 3, 1 / 2, 2 / 3, 2 / 3, 5 / 6, 1, 1])
