"""Profiles of simulated devices: how long steps take and how much the KV cache holds.

Profiles that come with the package are files in `profiles/`. Those computed from data sheets are
written by `scheduler.simulation.roofline`, those computed tile by tile by
`scheduler.simulation.ascend`; the others were measured.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scheduler.cost_model import CostModel
from scheduler.task import Limits

PROFILES = Path(__file__).parent / "profiles"
"""Folder of the package's profiles, each a JSON file of its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """A model on an accelerator, as scheduling sees it."""

    name: str
    source: str
    """Origin of the numbers."""
    modelled: bool
    """Whether the numbers are computed from data on the hardware; otherwise they were measured."""
    cost_model: CostModel
    """Predicts the seconds of a step."""
    limits: Limits
    """What a step and the KV cache can hold."""
    crowded_cost_model: CostModel | None = None
    """Predicts the seconds of a step while all other workers compute too, for workers that share a
    machine's memory bandwidth, caches and clock; None if they share none. While only some compute,
    times are interpolated by their share."""

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.limits.num_kv_blocks * self.limits.kv_block_size

    def to_dict(self) -> dict[str, Any]:
        """The profile as JSON can hold it; `DeviceProfile.from_dict` restores it."""
        return {
            "name": self.name,
            "source": self.source,
            "modelled": self.modelled,
            "limits": asdict(self.limits),
            "cost_model": self.cost_model.to_dict(),
            "crowded_cost_model": self.crowded_cost_model and self.crowded_cost_model.to_dict(),
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "DeviceProfile":
        """The profile that `to_dict` described; ValueError, TypeError or KeyError if malformed."""
        return cls(
            name=state["name"],
            source=state["source"],
            modelled=state["modelled"],
            limits=Limits(**state["limits"]),
            cost_model=CostModel.from_dict(state["cost_model"]),
            crowded_cost_model=CostModel.from_dict(crowded)
            if (crowded := state.get("crowded_cost_model"))
            else None,
        )


def device_names() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(path.stem for path in PROFILES.glob("*.json"))


def read_device(name: str | Path) -> DeviceProfile:
    """Read a profile of the package by its name, or any other by the path of its `.json` file.

    ValueError if there is no such profile, or if it is malformed.
    """
    path = Path(name) if str(name).endswith(".json") else PROFILES / f"{name}.json"
    if not path.is_file():
        raise ValueError(
            f"no device profile {str(name)!r}; use one of {', '.join(device_names())}, or the path "
            "of a .json file of the same form"
        )
    try:
        return DeviceProfile.from_dict(json.loads(path.read_text()))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a device profile: {error!r}") from error
