"""The layers: which folder may import what, so that decisions, computing and wiring stay apart."""

import ast
import sys
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("scheduler", "workers", "cluster")

# Folders of leftovers grow for ever; a function belongs next to its caller or its noun.
VAGUE_NAMES = {"utils", "common", "helpers", "misc", "base"}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What the files below one folder may import, in addition to the standard library."""

    only: frozenset[str] | None = None
    """The only modules allowed; None allows all that the other fields do not refuse."""
    never: frozenset[str] = frozenset()
    """Modules refused in every file, the standard library's included."""
    only_in: Mapping[str, str] = field(default_factory=dict)
    """Modules allowed in files of one name pattern and in no other."""


# The first folder that holds a file is its layer.
LAYERS = {
    "scheduler": Layer(
        only=frozenset({"scheduler", "numpy"}),
        # Time comes in as `now`, or a decision could not be replayed.
        never=frozenset({"asyncio", "datetime", "sched", "time", "timeit"}),
    ),
    "workers/kernels": Layer(
        only=frozenset({"workers.kernels", "workers.home", "numpy"}),
        only_in={"torch": "triton_*.py", "triton": "triton_*.py", "setuptools": "build.py"},
    ),
    "workers": Layer(
        never=frozenset({"cluster", "fastapi", "ray", "triton"}),
        only_in={"vllm": "vllm_*.py", "torch": "vllm_*.py"},
    ),
    "cluster": Layer(
        never=frozenset({"torch", "triton", "workers.kernels"}),
        only_in={"vllm": "vllm_*.py"},
    ),
}

# The rooms of each package from the ground up. A room is a file or folder directly in the package.
# A file imports from its own room and from lower floors, never from its own floor elsewhere.
FLOORS: dict[str, tuple[frozenset[str], ...]] = {
    "scheduler": (
        # The decisions themselves: one floor of files that may use each other.
        frozenset(),
        frozenset({"simulation"}),
    ),
    "workers": (
        frozenset(
            {
                *("config", "cpus", "engine_request", "errors", "home", "latest", "seams"),
                *("sockets", "start", "timeline"),
            }
        ),
        frozenset({"kernels", "token_stream"}),
        frozenset({"drafts", "plugin", "step_history"}),
        frozenset({"reports"}),
        frozenset({"engine"}),
        frozenset({"drafters", "profiling"}),
        frozenset({"worker"}),
    ),
    "cluster": (
        frozenset({"errors", "placement", "ray_cluster"}),
        frozenset({"background_loop", "call_parameters", "keys", "models"}),
        frozenset({"config"}),
        frozenset({"observe"}),
        frozenset({"ingress", "replicas"}),
        frozenset({"app", "chunk_receiver"}),
        frozenset({"client"}),
        frozenset({"cli"}),
    ),
}


def test_every_file_keeps_to_its_layer() -> None:
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    files = {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}

    assert {name.split("/")[0] for name in files} == set(PACKAGES)
    assert [fault for name, source in files.items() for fault in faults(name, source)] == []


def test_every_import_goes_down() -> None:
    found = [step for module, used in uses(ROOT).items() for step in steps_up(module, used)]

    assert found == []


def test_no_import_goes_in_a_circle() -> None:
    assert circles(uses(ROOT)) == []


@pytest.mark.parametrize(
    ("module", "used", "why"),
    [
        (
            "cluster.config.app_config",
            "cluster.ingress.ingress",
            "cluster/config is on floor 2, cluster/ingress on 4; move what both need to floor 2 "
            "or below",
        ),
        (
            "cluster.replicas",
            "cluster.ingress.calls",
            "cluster/replicas is on floor 4, cluster/ingress on 4; move what both need to floor 3 "
            "or below",
        ),
        (
            "scheduler.hybrid",
            "scheduler.simulation.traces",
            "scheduler/hybrid is on floor 0, scheduler/simulation on 1; move what both need to "
            "floor 0 or below",
        ),
    ],
)
def test_a_step_up_is_reported_with_its_remedy(module: str, used: str, why: str) -> None:
    assert steps_up(module, {used}) == [f"{module} imports {used}: {why}"]


def test_a_room_without_a_floor_is_reported() -> None:
    assert steps_up("workers.attic", {"workers.config"}) == [
        "workers/attic has no floor: add it to FLOORS"
    ]


def test_a_circle_is_reported_as_the_way_around() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


REFUSED = {
    "scheduler/hybrid.py": (
        *("ray", "vllm", "torch", "pydantic", "msgspec", "workers", "cluster.config.app_config"),
        *("asyncio", "datetime", "sched", "time", "timeit"),  # clocks
    ),
    "workers/kernels/gemm.py": (
        *("ray", "vllm", "scheduler.task", "cluster", "workers", "workers.worker", "msgspec"),
        *("torch", "triton.language"),
    ),
    "workers/kernels/triton_gemm.py": ("vllm", "workers.worker"),
    "workers/worker.py": (
        *("cluster.config.app_config", "fastapi", "ray", "triton", "torch", "vllm.v1.engine"),
    ),
    "workers/engine/vllm_engine.py": ("cluster.config.app_config", "fastapi", "ray", "triton"),
    "cluster/app.py": ("torch", "triton", "workers.kernels.gemm", "vllm"),
    "cluster/ingress/vllm_frontend.py": ("torch", "triton", "workers.kernels.gemm"),
}
"""Modules that are refused, by file."""


@pytest.mark.parametrize(
    ("name", "module"), [(name, module) for name, modules in REFUSED.items() for module in modules]
)
def test_what_a_layer_does_not_allow_is_a_fault(name: str, module: str) -> None:
    assert faults(name, f"import {module}\n") == [f"{name}:1 imports {module}"]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("scheduler/hybrid.py", "import math\nimport numpy as np\nfrom scheduler import task\n"),
        ("workers/kernels/gemm.py", "import ctypes\nfrom workers.kernels.tiles import Tile\n"),
        ("workers/kernels/triton_gemm.py", "import torch\nimport triton.language\n"),
        ("workers/worker.py", "import time\nimport zmq\nimport scheduler.task, workers.kernels\n"),
        ("workers/engine/vllm_engine.py", "import torch, vllm.v1.engine\n"),
        ("cluster/ingress/vllm_frontend.py", "import vllm\n"),
        ("cluster/app.py", "import asyncio\nimport fastapi, ray\nfrom workers import worker\n"),
    ],
)
def test_what_a_layer_is_made_of_is_allowed(name: str, source: str) -> None:
    assert faults(name, source) == []


def test_a_name_that_only_begins_alike_is_another_module() -> None:
    assert faults("workers/worker.py", "import rayon, torchlight, vllm_extra\n") == []


@pytest.mark.parametrize(
    "source",
    [
        "def run():\n    import torch\n",
        "if TYPE_CHECKING:\n    from torch import Tensor\n",
        "try:\n    import torch.nn as nn\nexcept ImportError:\n    pass\n",
        "x = 1\nimportlib.import_module('torch')\n",
        "x = 1\nmodule = __import__('torch')\n",
    ],
    ids=["in a function", "for types only", "in a try", "import_module", "__import__"],
)
def test_no_way_of_importing_goes_unseen(source: str) -> None:
    (fault,) = faults("cluster/app.py", source)

    assert fault.startswith("cluster/app.py:2 imports torch")


def test_a_submodule_named_after_from_is_seen() -> None:
    assert faults("cluster/app.py", "from workers import kernels\n") == [
        "cluster/app.py:1 imports workers.kernels"
    ]


@pytest.mark.parametrize("source", ["from . import task\n", "from .task import Stage\n"])
def test_imports_are_absolute(source: str) -> None:
    assert faults("scheduler/hybrid.py", source) == ["scheduler/hybrid.py:1 imports relatively"]


@pytest.mark.parametrize("vague", sorted(VAGUE_NAMES))
def test_no_file_or_folder_has_a_vague_name(vague: str) -> None:
    assert faults(f"cluster/{vague}.py", "") == [f"cluster/{vague}.py has a vague name"]
    assert faults(f"cluster/{vague}/x.py", "") == [f"cluster/{vague}/x.py has a vague name"]


def faults(name: str, source: str) -> list[str]:
    """Each breach of the rules by one file, as a sentence; `name` is its path from the root."""
    path = PurePosixPath(name)
    layer = next(LAYERS[folder] for folder in LAYERS if path.is_relative_to(folder))
    found = [f"{name} has a vague name"] if VAGUE_NAMES & {path.stem, *path.parts} else []
    for line, module in sorted(imports(ast.parse(source))):
        if module.startswith("."):
            found.append(f"{name}:{line} imports relatively")
        elif not is_allowed(module, layer, path):
            found.append(f"{name}:{line} imports {module}")
    return found


def uses(root: Path) -> dict[str, set[str]]:
    """Our modules by dotted name, each with those of our modules that it imports anywhere."""
    paths = [path for package in PACKAGES for path in (root / package).rglob("*.py")]
    files = {dotted(path.relative_to(root)): path for path in paths}
    return {
        name: {
            used
            for _, module in imports(ast.parse(path.read_text()))
            if (used := module_of(module, files.keys())) and used != name
        }
        for name, path in files.items()
    }


def dotted(path: Path) -> str:
    """The name by which a file is imported."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def module_of(name: str, modules: Set[str]) -> str:
    """Our module that an imported name is or belongs to; empty if there is none."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def steps_up(module: str, used: Set[str]) -> list[str]:
    """Each import of a module that does not go down, with its remedy."""
    package, _, inside = module.partition(".")
    room, floors = inside.partition(".")[0], FLOORS[package]
    if room and package != "scheduler" and not any(room in floor for floor in floors):
        return [f"{package}/{room} has no floor: add it to FLOORS"]
    own = floor_of(package, room)
    found = []
    for other in sorted(used):
        other_package, _, other_inside = other.partition(".")
        other_room = other_inside.partition(".")[0]
        if other_package != package or other_room in ("", room):
            continue
        theirs = floor_of(package, other_room)
        # All of scheduler's own files share the ground floor.
        if theirs > own or (theirs == own and package != "scheduler"):
            found.append(
                f"{module} imports {other}: {package}/{room} is on floor {own}, "
                f"{package}/{other_room} on {theirs}; move what both need to floor "
                f"{own if theirs > own else own - 1} or below"
            )
    return found


def floor_of(package: str, room: str) -> int:
    """The floor of a room; 0 if it is not listed."""
    return next((n for n, floor in enumerate(FLOORS[package]) if room in floor), 0)


def circles(uses: Mapping[str, Set[str]]) -> list[list[str]]:
    """One way around for each group of modules that import each other."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(way: list[str]) -> None:
        for used in sorted(uses.get(way[-1], set()) - done):
            if used in way:
                found.append(way[way.index(used) :])
            else:
                walk([*way, used])
        done.add(way[-1])

    for module in sorted(uses):
        if module not in done:
            walk([module])
    return found


def is_allowed(module: str, layer: Layer, path: PurePosixPath) -> bool:
    """Whether a file of a layer may import a module."""
    if any(is_within(module, refused) for refused in layer.never):
        return False
    for limited, pattern in layer.only_in.items():
        if is_within(module, limited):
            return path.match(pattern)
    if layer.only is None or module.split(".")[0] in sys.stdlib_module_names:
        return True
    return any(is_within(module, allowed) for allowed in layer.only)


def is_within(module: str, package: str) -> bool:
    """Whether a module is a package or inside it."""
    return module == package or module.startswith(f"{package}.")


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and module of each import, at any depth; a relative one begins with a dot."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(level=level) if level > 0:
                yield node.lineno, "."
            case ast.ImportFrom(module=str(module), names=names):
                # `from workers import kernels` may name a module as well as a value.
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield node.lineno, module
