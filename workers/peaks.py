"""The fastest that a device was seen to compute and to read, which MFU and MBU are shares of."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Peaks:
    """Of one worker's device, with its number of threads."""

    flops_per_s: float
    bytes_per_s: float
