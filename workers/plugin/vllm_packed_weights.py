"""The packed weights of one engine, kept in a file so that its successor need not pack them."""

import dataclasses
import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

import vllm
from vllm.config import VllmConfig

from workers.home import home
from workers.kernels import native
from workers.kernels.gemm import Weight
from workers.kernels.weights_file import kernels_key, read_weights, write_weights

logger = logging.getLogger(__name__)

LOAD_FORMATS = {"auto", "hf", "safetensors", "pt"}
"""vLLM's load formats whose weights depend on the files of the checkpoint alone."""
FILES = {".safetensors", ".bin", ".pt", ".json"}
"""Suffixes of the files that weights are loaded by; others in the folder may change at will."""
SETTLED_S = 0.1
"""Age of a file from which on a later change has a later time, by any kernel's clock."""


class CheckpointChanged(RuntimeError):
    """The files of a checkpoint are no longer those that an engine began to load."""


class PackedWeights:
    """What is in the file of an engine's packed weights, and what is to go there."""

    def __init__(self, config: VllmConfig, weight_format: str, keep: bool) -> None:
        """Read the file if it holds what packing would give; without `keep` there is no file."""
        self._folder = Path(config.model_config.model)
        self._began = _identity(self._folder) if keep and _is_plain(config) else None
        self._key = ""
        self._file = _path(self._folder, weight_format)
        self._found: dict[str, Weight] = {}
        if self._began is not None:
            self._key = json.dumps([_key(config, weight_format), self._began], default=str)
            self._found = read_weights(self._file, self._key)
        self._made: dict[str, Weight] = {}
        self._nameless = {""}
        """Names that do not tell layers apart."""

    @property
    def num_found(self) -> int:
        """Weights that the file has."""
        return len(self._found)

    def find(self, prefix: str, n: int, k: int, *, gate_up: bool) -> Weight | None:
        """The packed weight of a layer, if the file has it."""
        weight = self._found.get(prefix)
        if weight is None or (weight.n, weight.k, weight.gate_up) != (n, k, gate_up):
            return None
        return weight

    def add(self, prefix: str, weight: Weight) -> None:
        """Take note of a weight that was packed."""
        if prefix in self._made:
            self._nameless.add(prefix)
        self._made[prefix] = weight

    def kept(self) -> dict[str, Weight]:
        """All weights that the file is to have: those of layers with a name of their own."""
        weights = self._found | self._made
        return {name: weight for name, weight in weights.items() if name not in self._nameless}

    def finish(self) -> None:
        """Write what was packed, once the whole model is loaded; why it cannot be is logged.

        CheckpointChanged if some weights came from the file, and the checkpoint is now another one.
        """
        if self._began is None:
            return
        is_same = _identity(self._folder) == self._began
        if self._found and not is_same:
            raise CheckpointChanged(f"the files in {self._folder} changed while they were loaded")
        if not self._made or not is_same:
            return
        try:
            write_weights(self._file, self._key, self.kept())
        except OSError as error:
            logger.warning(
                "packed weights cannot be kept, and each start packs them again; free space there, "
                "or set worker.keep_packed_weights: false",
                extra={"file": str(self._file), "error": repr(error)},
            )
        self._made.clear()


def _is_plain(config: VllmConfig) -> bool:
    """Whether the weights are those of one checkpoint's files as they are, on one device."""
    speculative_config = config.speculative_config
    return (
        # A model that drafts in the same engine may have layers of the same names.
        (speculative_config is None or speculative_config.method == "custom_class")
        and config.load_config.load_format in LOAD_FORMATS
        and config.parallel_config.world_size == 1
        and Path(config.model_config.model).is_dir()
    )


def _identity(folder: Path) -> list[Any] | None:
    """The state of a checkpoint's files; None if one has just changed, and may again unseen.

    The time of a file's last change (ctime) cannot be set, unlike that of its content (mtime).
    """
    files = sorted(file for file in folder.iterdir() if file.suffix in FILES)
    stats = {file.name: file.stat() for file in files}
    if any(time.time() - stat.st_ctime < SETTLED_S for stat in stats.values()):
        return None
    return [
        [name, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        for name, stat in stats.items()
    ]


def _key(config: VllmConfig, weight_format: str) -> list[Any]:
    model_config = config.model_config
    return [
        *kernels_key(),
        vllm.__version__,
        weight_format,
        str(model_config.dtype),
        model_config.hf_config.to_dict(),
        # As text: some of their values are no JSON, and an equal text is all that counts.
        repr(dataclasses.asdict(config.load_config)),
        repr(model_config.hf_overrides),
    ]


def _path(folder: Path, weight_format: str) -> Path:
    """One file for all states of a checkpoint: weights of an earlier one are of no use."""
    digest = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    name = f"{folder.name}-{weight_format}-{native.isa()}-{digest}.weights"
    return home() / "packed" / name
