"""What was measured on this machine: the table that row tiles are chosen from."""

import functools
import json
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np

from workers.kernels import native
from workers.kernels.tiles import TileCosts, default_costs, parse_costs


def path() -> Path:
    """Where this machine's figures lie: a file for each CPU and instruction set."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = "-".join([*_cpu().split(), native.isa()]).replace("/", "-")
    return cache / "xyserve" / "calibration" / f"{name}.json"


@functools.cache
def _costs_of(isa: str) -> TileCosts:
    max_height = native.kernels().max_height
    try:
        measured = parse_costs(json.loads(path().read_text()), max_height)
    except (FileNotFoundError, json.JSONDecodeError):
        measured = None
    return measured or default_costs(max_height)


def tile_costs() -> TileCosts:
    """The measured costs of row tiles, or the built-in ones where none were measured."""
    return _costs_of(native.isa())


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
