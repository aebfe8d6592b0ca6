"""The costs of row tiles on this machine, measured or built in, from which plans choose tiles."""

import functools
import json
import logging
import math
import platform
import time
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from workers.home import home, replace_file
from workers.kernels import native
from workers.kernels.tiles import TileCosts, default_costs

logger = logging.getLogger(__name__)

SHAPE = (512, 768)
"""N and K of the weight to measure with: in bf16 (768 KiB) it stays in the caches."""

UNIT = f"ns of one row tile on one panel of {SHAPE[1]} input features"


class Inputs(StrEnum):
    """What a product makes of its inputs."""

    FLOAT32 = "float32"
    BF16 = "bf16"
    INT8 = "int8"


TileTable = Mapping[Inputs, TileCosts]


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


def tile_costs(inputs: Inputs = Inputs.FLOAT32) -> TileCosts:
    """Measured costs of row tiles, or the built-in ones if none were measured."""
    return _in_use(native.isa())[0][inputs]


def fastest(*choice: Inputs) -> Inputs:
    """Of some inputs those whose tiles take the least time per row."""
    return min(choice, key=lambda inputs: tile_costs(inputs).of_row)


def inputs_of(weight_format: str, activation_format: str) -> Inputs:
    """The inputs that formats of `WorkerConfig` stand for; `auto` is the fastest on this CPU."""
    if activation_format != "auto":
        return Inputs(activation_format)
    return fastest(Inputs.FLOAT32, Inputs.BF16 if weight_format == "auto" else Inputs.INT8)


def max_height(inputs: Inputs) -> int:
    """Rows of the tallest tile."""
    kernels = native.kernels()
    of_inputs = {
        Inputs.FLOAT32: kernels.max_height,
        Inputs.BF16: kernels.max_bf16_height,
        Inputs.INT8: kernels.max_int8_height,
    }
    return int(of_inputs[inputs])


def built_in_table() -> TileTable:
    """Costs where none were measured, by whether the CPU has an instruction for such products."""
    kernels = native.kernels()
    of_row = {
        Inputs.FLOAT32: 1.0,
        Inputs.BF16: 0.5 if kernels.has_bf16_dot else 2.0,
        Inputs.INT8: 0.4 if kernels.has_int8_dot else 1.5,
    }
    return {inputs: default_costs(max_height(inputs), cost) for inputs, cost in of_row.items()}


def is_measured() -> bool:
    """Whether `tile_costs` were measured on this machine."""
    return _in_use(native.isa())[1]


@functools.cache
def _in_use(isa: str) -> tuple[TileTable, bool]:
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
    return built_in_table(), False


def _parse(document: object) -> TileTable:
    """The costs in a file; ValueError says why they do not fit this machine."""
    if not isinstance(document, dict):
        raise ValueError("it is not a JSON object")
    for key, own in (("cpu", cpu()), ("isa", native.isa())):
        if document.get(key) != own:
            raise ValueError(f"its {key} is {document.get(key)!r}, this machine's is {own!r}")
    of_inputs = document.get("tile_costs")
    if not isinstance(of_inputs, dict) or set(of_inputs) != set(Inputs):
        raise ValueError(f"its tile_costs are not those of {', '.join(Inputs)}")
    return {inputs: _parse_costs(inputs, of_inputs[inputs]) for inputs in Inputs}


def _parse_costs(inputs: Inputs, costs: object) -> TileCosts:
    height = max_height(inputs)
    if (
        not isinstance(costs, list)
        or len(costs) != height
        or not all(isinstance(cost, int | float) and 0 < cost < math.inf for cost in costs)
    ):
        raise ValueError(f"its tile_costs of {inputs} are not {height} positive numbers")
    return TileCosts(tuple(map(float, costs)))


def save(costs: TileTable) -> None:
    """Write the costs for this and later processes on this machine."""
    document = {
        "tile_costs": {
            inputs: [round(cost, 2) for cost in costs[inputs].of_height] for inputs in Inputs
        },
        "unit": UNIT,
        "cpu": cpu(),
        "isa": native.isa(),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    replace_file(path(), json.dumps(document, indent=1) + "\n")
    _in_use.cache_clear()
