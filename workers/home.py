"""The folder for what XY-Serve keeps between runs, and how a file gets there."""

import os
from pathlib import Path


def home() -> Path:
    """The folder: `XYSERVE_HOME`, or `xyserve` in the user's cache folder (`XDG_CACHE_HOME`)."""
    if own := os.environ.get("XYSERVE_HOME"):
        return Path(own).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().absolute() / "xyserve"


def replace_file(file: Path, text: str) -> None:
    """Write a file and its folders; who reads it meanwhile finds the old text or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_name(f"{file.name}.{os.getpid()}")
    whole.write_text(text)
    whole.replace(file)
