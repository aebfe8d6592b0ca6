"""What a simulated worker is: how long its steps take, and how much its KV cache holds.

Profiles that come with the package are files in `profiles/`: those computed from data sheets were
written by `scheduler.simulation.roofline`, the others were measured.
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
    """Whether the numbers are computed from data sheets; otherwise they were measured."""
    cost_model: CostModel
    """Predicts the seconds of a step."""
    limits: Limits
    """What a step and the KV cache can hold."""
    crowded_cost_model: CostModel | None = None
    """Predicts them while all other workers compute too, if workers share a machine: its memory
    bandwidth, caches and clock. With some computing, the time is interpolated by their share."""

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.limits.num_kv_blocks * self.limits.kv_block_size

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; `DeviceProfile.from_dict` gives it back."""
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
            crowded_cost_model=(crowded := state.get("crowded_cost_model"))
            and CostModel.from_dict(crowded),
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
