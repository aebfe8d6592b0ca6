"""The folder that XY-Serve keeps files in between runs, and how one is written."""

import os
from pathlib import Path


def home() -> Path:
    """`XYSERVE_HOME`, or `xyserve` in the user's cache folder (`XDG_CACHE_HOME` or ~/.cache)."""
    if own := os.environ.get("XYSERVE_HOME"):
        return Path(own).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().absolute() / "xyserve"


def replace_file(file: Path, text: str) -> None:
    """Write a file, creating its folders; concurrent readers see the old text or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_name(f"{file.name}.{os.getpid()}")
    whole.write_text(text)
    whole.replace(file)
