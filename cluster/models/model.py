"""Models by name: where their files are, what is missing, how large they are."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.models.default_model import (
    DEFAULT_MODEL,
    FetchProgress,
    fetch_default_model,
    is_complete,
    is_fetched,
)
from workers.home import home


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model in the home folder; incomplete until its fetch has finished."""

    name: str
    path: Path
    num_bytes: int
    is_complete: bool


def resolve_model(name: str, progress: FetchProgress | None = None) -> str:
    """Turn a model's name into what vLLM loads: a local directory or a hub id.

    The default model is fetched when it is missing, which may raise FetchError.
    ValueError: `name` looks like a path, but there is no such directory.
    """
    if name == DEFAULT_MODEL:
        return str(fetch_default_model(progress))
    path = Path(name).expanduser()
    if name and path.is_dir():
        return str(path.absolute())
    if not name or name.startswith(("./", "../", "/", "~")):
        raise ValueError(
            f"model {name!r} is not a directory; give the directory of a checkpoint "
            f"(with config.json), a hub id such as org/name, or {DEFAULT_MODEL}"
        )
    return name


def list_models() -> list[LocalModel]:
    """The models in the home folder, unfinished fetches included."""
    models = home() / "models"
    if not models.is_dir():
        return []
    return [
        LocalModel(
            name=path.name.removesuffix(".partial"),
            path=path,
            num_bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
            is_complete=is_complete(path),
        )
        for path in sorted(models.iterdir())
        if path.is_dir()
    ]


def find_model(name: str) -> Path | None:
    """A model's directory on this machine; None if it has not been fetched yet.

    For a name that can be neither found nor fetched: the path, where there is no directory.
    """
    if name == DEFAULT_MODEL and not is_fetched():
        return None
    try:
        directory = Path(resolve_model(name))
        if directory.is_dir():
            return directory
        # It is installed with vLLM, which may be missing.
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json")
    except ImportError:
        return None
    except ValueError:
        return Path(name).expanduser()
    return Path(cached).parent if isinstance(cached, str) else None


def missing_files(directory: Path) -> list[str]:
    """Files missing from a checkpoint: config, tokenizer, weights."""
    needed = {
        "config.json": ("config.json",),
        "a tokenizer": ("tokenizer.*", "tekken.json", "vocab.*", "*.tiktoken"),
        "weights": ("*.safetensors", "*.bin", "*.pt"),
    }
    missing = [
        what
        for what, patterns in needed.items()
        if not any(file.exists() for pattern in patterns for file in directory.glob(pattern))
    ]
    index = _read_json(directory / "model.safetensors.index.json")
    shards = sorted(set(index.get("weight_map", {}).values()))
    return missing + [shard for shard in shards if not (directory / shard).exists()]


def weights_bytes(directory: Path, dtype: str) -> int | None:
    """Size in memory of a checkpoint's weights as `dtype`; None if it has no safetensors."""
    # Some checkpoints contain the weights a second time, in consolidated.safetensors.
    files = list(directory.glob("model*.safetensors")) or list(directory.glob("*.safetensors"))
    if not files:
        return None
    num_bytes = sum(file.stat().st_size for file in files)
    config = _read_json(directory / "config.json")
    widths = {"float32": 4, "bfloat16": 2, "float16": 2}
    stored = widths.get(config.get("dtype") or config.get("torch_dtype", ""))
    if stored is None or dtype not in widths or "quantization_config" in config:
        return num_bytes
    return num_bytes * widths[dtype] // stored


def _read_json(path: Path) -> Any:
    """The object in a JSON file; empty if the file cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
