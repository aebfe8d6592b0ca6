"""The costs of row tiles on this machine, measured or built in, from which plans choose tiles."""

import functools
import json
import logging
import math
import platform
import time
from pathlib import Path

from workers.home import home, replace_file
from workers.kernels import native
from workers.kernels.tiles import TileCosts, default_costs

logger = logging.getLogger(__name__)

SHAPE = (512, 768)
"""N and K of the weight to measure with: in bf16 (768 KiB) it stays in the caches."""

UNIT = f"ns of one row tile on one panel of {SHAPE[1]} input features"


def path() -> Path:
    """File of this machine's costs: one per CPU and instruction set."""
    name = "-".join([*cpu().split(), native.isa()]).replace("/", "-")
    return home() / "calibration" / f"{name}.json"


def cpu() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def tile_costs() -> TileCosts:
    """Measured costs of row tiles, or the built-in ones if none were measured."""
    return _in_use(native.isa())[0]


def is_measured() -> bool:
    """Whether `tile_costs` were measured on this machine."""
    return _in_use(native.isa())[1]


@functools.cache
def _in_use(isa: str) -> tuple[TileCosts, bool]:
    """The costs, and whether `save` wrote them; why a file cannot be used is logged."""
    file = path()
    try:
        return _parse(json.loads(file.read_text())), True
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        logger.warning(
            "measured row tiles cannot be used, only built-in ones; to measure: xyserve calibrate",
            extra={"file": str(file), "error": str(error)},
        )
    return default_costs(native.kernels().max_height), False


def _parse(document: object) -> TileCosts:
    """The costs in a file; ValueError says why they do not fit this machine."""
    if not isinstance(document, dict):
        raise ValueError("it is not a JSON object")
    for key, own in (("cpu", cpu()), ("isa", native.isa())):
        if document.get(key) != own:
            raise ValueError(f"its {key} is {document.get(key)!r}, this machine's is {own!r}")
    costs, height = document.get("tile_costs"), native.kernels().max_height
    if (
        not isinstance(costs, list)
        or len(costs) != height
        or not all(isinstance(cost, int | float) and 0 < cost < math.inf for cost in costs)
    ):
        raise ValueError(f"its tile_costs are not {height} positive numbers")
    return TileCosts(tuple(map(float, costs)))


def save(costs: TileCosts) -> None:
    """Write the costs for this and later processes on this machine."""
    document = {
        "tile_costs": [round(cost, 2) for cost in costs.of_height],
        "unit": UNIT,
        "cpu": cpu(),
        "isa": native.isa(),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    replace_file(path(), json.dumps(document, indent=1) + "\n")
    _in_use.cache_clear()
