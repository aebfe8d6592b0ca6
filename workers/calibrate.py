"""The measured table of row tiles as the command line shows it, and measuring it anew."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from workers.kernels import calibration, native, tiles


@dataclass(frozen=True, slots=True)
class Calibration:
    """The table in use on this machine."""

    cpu: str
    isa: str
    path: Path
    """Where the table lies, or would lie once it is measured."""
    is_measured: bool
    """False of the built-in table."""
    tile_costs: tuple[float, ...]
    """Time of one row tile by its height (index 0 is height 1), in any unit."""

    def row_tiles(self, num_rows: int) -> tuple[int, ...]:
        """Heights of the tiles that `num_rows` rows are cut into."""
        return tiles.row_tiles(num_rows, tiles.TileCosts(self.tile_costs))


def current_calibration() -> Calibration:
    """What workers on this machine choose row tiles from."""
    return Calibration(
        calibration.cpu(),
        native.isa(),
        calibration.path(),
        calibration.is_measured(),
        calibration.tile_costs().of_height,
    )


def calibrate(progress: Callable[[float], None]) -> Calibration:
    """Measure and save the table, telling `progress` the share done; OSError: cannot be saved."""
    calibration.save(calibration.measure(progress))
    return current_calibration()
