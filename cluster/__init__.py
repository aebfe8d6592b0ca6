"""Connects: the Ray Serve application, its HTTP ingress, client handle and command line."""

import importlib.util
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


def _claim(name: str) -> None:
    """Make sure that `import name` finds our package, whose name a file of a user's may have too.

    Ray puts the folder in which a program of its cluster was started first in the path of its own
    processes, where it must not shadow ours. In a user's program it is an ImportError.
    """
    if (module := sys.modules.get(name)) is not None:
        found = getattr(module, "__file__", None)
    else:
        spec = importlib.util.find_spec(name)
        found = spec.origin if spec else None
    if found and Path(found).resolve().parent == _ROOT / name:
        return
    if module is None and Path(sys.argv[0]).name == "default_worker.py":
        sys.path.insert(0, str(_ROOT))
        importlib.import_module(name)
        sys.path.remove(str(_ROOT))
        return
    raise ImportError(
        f"`import {name}` finds {found}, which shadows XY-Serve's package of that name in {_ROOT}: "
        "rename it, or run Python with -P (PYTHONSAFEPATH=1), which leaves the script's folder out "
        "of the path",
        name=name,
        path=found,
    )


for _name in ("scheduler", "workers"):
    _claim(_name)
