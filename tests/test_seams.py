"""Seams with other libraries: how a difference is reported, and that no seam is left out."""

import ast
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from cluster.ingress.vllm_seams import FRONT_END
from cluster.placement.ray_seams import RAY
from workers.plugin.vllm_seams import VLLM
from workers.seams import Seam, SeamBroken, SeamTable, Use, seams

ROOT = Path(__file__).resolve().parent.parent
PATHS = [
    path
    for package in ("cluster", "workers")
    for path in (ROOT / package).rglob("*.py")
    if path != ROOT / "workers/kernels/build.py"  # runs in setuptools, and never with the cluster
]
TESTS = list((ROOT / "tests").rglob("*.py"))
LIBRARIES = ("vllm", "ray", "starlette", "fastapi")
TABLE = (*VLLM.seams, *FRONT_END.seams, *RAY.seams)
NAMES = {word for seam in TABLE for word in re.findall(r"\w+", seam.member)}

LIBRARY = """
class Base:
    kept: int = 0

    def __init__(self):
        self.assigned = 1
        self.typed: int = 2

class Engine(Base):
    def step(self, request, *, timeout=None, clock=print):
        self.counted = 0

    @staticmethod
    def make(kind):
        return kind

def run(engine, log=True):
    return make_engine(engine)

def make_engine(engine):
    return "theirs"
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A library in one file, installed as pytest is."""
    (tmp_path / "library.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(str(tmp_path))
    import library  # type: ignore[import-not-found]

    monkeypatch.setitem(sys.modules, "library", library)
    yield library
    del sys.modules["library"]


def table(rows: str, version: str = metadata.version("pytest")) -> SeamTable:
    return SeamTable("Library", ("no-such-package", "pytest"), version, "install it", seams(rows))


SAME = """
# A comment.
library:Engine
    called step(self, request, *,
        timeout=None, clock=...)
    overridden make(kind)
    read kept: int
    read assigned typed counted
library
    replaced make_engine(engine)
    named self.counted = 0
"""


def test_a_table_in_text_form_has_a_row_for_each_member() -> None:
    assert [(str(seam), seam.use, seam.expected) for seam in seams(SAME)] == [
        ("library.Engine.step", Use.CALLED, "(self, request, *, timeout=None, clock=...)"),
        ("library.Engine.make", Use.OVERRIDDEN, "(kind)"),
        ("library.Engine.kept", Use.READ, "int"),
        ("library.Engine.assigned", Use.READ, ""),
        ("library.Engine.typed", Use.READ, ""),
        ("library.Engine.counted", Use.READ, ""),
        ("library.make_engine", Use.REPLACED, "(engine)"),
        ("library.self.counted = 0", Use.NAMED, ""),
    ]


def test_a_library_that_has_all_of_the_table_passes(library: ModuleType) -> None:
    table(SAME).check()


def test_another_version_is_an_error_whatever_it_has(library: ModuleType) -> None:
    version = metadata.version("pytest")

    with pytest.raises(SeamBroken) as error:
        table(SAME, "0.1.0").check()
    assert str(error.value) == (
        f"Library {version} is installed, and XY-Serve is written for 0.1.0; install it"
    )


def test_a_later_release_of_the_series_is_the_same(library: ModuleType) -> None:
    major, minor, _ = metadata.version("pytest").split(".")

    table(SAME, f"{major}.{minor}.99").check()


def test_a_library_that_is_not_installed_is_reported() -> None:
    absent = SeamTable("Library", ("no-such-package",), "1.0", "install it", ())

    with pytest.raises(SeamBroken, match=r"^Library \(none\) is installed, and .* for 1\.0; "):
        absent.check()


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ("library:Engine\n    read gone", "library.Engine.gone is gone"),
        (
            "library:Gone\n    read member",
            "library.Gone.member is gone (module 'library' has no attribute 'Gone')",
        ),
        (
            "library.gone\n    read member",
            "library.gone.member is gone (No module named 'library.gone'; 'library' is not a "
            "package)",
        ),
        (
            "library:Engine\n    called step(self, request)",
            "library.Engine.step is `(self, request, *, timeout=None, clock=...)`, expected "
            "`(self, request, first)`",
        ),
        (
            "library:Engine\n    overridden step(self, request)",
            "library.Engine.step is `(self, request, *, timeout=None, clock=...)`, expected "
            "`(self, request)`",
        ),
        (
            "library:Engine\n    read kept: str",
            "library.Engine.kept is `int`, expected `str`",
        ),
        ("library\n    named self.gone = 0", "library.self.gone = 0 is not named any more"),
    ],
)
def test_a_difference_names_the_seam_and_both_versions(
    library: ModuleType, rows: str, fault: str
) -> None:
    rows = rows.replace("called step(self, request)", "called step(self, request, first)")
    version = metadata.version("pytest")

    with pytest.raises(SeamBroken) as error:
        table(f"{rows}\n{SAME}", version).check()
    assert str(error.value) == (
        f"Library {version} is installed and differs from {version}, which XY-Serve is written "
        f"for: {fault}; install it"
    )


def test_a_function_that_is_called_may_have_new_optional_parameters(library: ModuleType) -> None:
    table("library:Engine\n    called step(self, request, *, timeout=None)").check()
    table("library:Engine\n    called step(self, request)").check()


def test_an_error_names_the_first_differences_only(library: ModuleType) -> None:
    rows = "library\n    read " + " ".join(f"gone_{n}" for n in range(10))

    with pytest.raises(SeamBroken, match=r"gone_7 is gone; and 2 more; install it$"):
        table(rows).check()


def test_a_member_is_replaced_for_a_while(library: ModuleType) -> None:
    with table(SAME).replaced(library, "make_engine", lambda engine: "ours"):
        assert library.run(None) == "ours"
    assert library.run(None) == "theirs"


def test_a_failure_puts_the_member_back(library: ModuleType) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        table(SAME).replaced(library, "make_engine", lambda engine: 1 / 0),
    ):
        library.run(None)
    assert library.run(None) == "theirs"


def test_a_member_of_a_class_can_be_replaced_on_one_of_its_objects(library: ModuleType) -> None:
    rows = table("library:Base\n    replaced assigned step")
    one, other = library.Engine(), library.Engine()

    rows.replace(one, "assigned", 5)
    with rows.replaced(one, "step", "ours"):
        assert (one.assigned, one.step) == (5, "ours")
    assert (other.assigned, one.step.__func__) == (1, library.Engine.step)


def test_a_static_method_is_put_back_as_one(library: ModuleType) -> None:
    rows = table("library:Engine\n    replaced make(kind)")

    with rows.replaced(library.Engine, "make", staticmethod(lambda kind: "ours")):
        assert library.Engine().make("x") == "ours"
    assert library.Engine().make("x") == "x"


def test_what_no_row_says_is_replaced_cannot_be(library: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"^'run' of library is replaced, but no seam with Libr"):
        table(SAME).replace(library, "run", None)
    with pytest.raises(ValueError, match=r"^'make' of library:Engine is replaced, but no seam"):
        table(SAME).replace(library.Engine(), "make", None)


# Nothing of another library is used without a row in a table.


def test_every_private_member_of_another_library_is_in_a_table() -> None:
    assert [fault for path in PATHS for fault in private_uses(path.read_text(), path)] == []


def test_everything_of_another_library_that_is_assigned_is_in_a_table() -> None:
    assert [fault for path in PATHS for fault in assignments(path.read_text(), path)] == []


def test_every_member_read_of_another_librarys_object_is_in_a_table() -> None:
    assert [fault for path in PATHS for fault in reads(path.read_text(), path)] == []


def test_no_table_has_a_row_for_what_is_no_longer_used() -> None:
    paths = [path for path in (*PATHS, *TESTS) if not path.stem.endswith("seams")]
    used = set(re.findall(r"\w+", "\n".join(path.read_text() for path in paths)))

    assert [str(seam) for seam in TABLE if last_word(seam) not in used | IMPLIED] == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("engine._theirs()", "_theirs"),
        ("getattr(engine, '_theirs', None)", "_theirs"),
        ("ray.init(_theirs=1)", "_theirs"),
        ("from vllm._theirs import thing", "vllm._theirs"),
        ("from vllm.module import _theirs", "vllm.module"),
    ],
)
def test_no_private_use_goes_unseen(source: str, name: str) -> None:
    assert list(private_uses(source, ROOT / "x.py")) == [f"x.py:1 uses {name}"]


@pytest.mark.parametrize(
    "source",
    [
        "from vllm.v1 import worker\nworker.build = None",
        "from vllm.v1 import worker\nworker.sub.build = None",
        "import vllm.v1\nsetattr(vllm.v1, 'build', None)",
        "def f(runner):\n    runner.never_ours = None",
        "def f(app):\n    app.middleware_stack = None",
    ],
)
def test_no_assignment_goes_unseen(source: str) -> None:
    (fault,) = assignments(source, ROOT / "x.py")

    assert fault.startswith("x.py:2 assigns ")


def test_no_read_of_an_annotated_parameter_goes_unseen() -> None:
    source = "from vllm.v1.request import Request\ndef f(r: Request | None): return r.never_named\n"

    assert list(reads(source, ROOT / "x.py")) == ["x.py:2 reads Request.never_named"]


DOCUMENTED = (
    "vllm.config.VllmConfig",
    "ray.serve.handle.DeploymentHandle",
    "ray.serve.schema.ApplicationStatusOverview",
    "fastapi.FastAPI",
    "starlette.requests.Request",
    "starlette.types.",
)
"""Classes whose members are public in their libraries' documentation."""

NARROWED = {"CPUAttentionMetadata.plan"}
"""Members of our own subclasses, to which an assertion narrows the object."""

IMPLIED = {"__init__", "__lt__", "SAGEMAKER_CONTAINER_LOG_LEVEL"}
"""Members that are called without being named, and the variable that a table's file sets."""

MEANT_TO_BE_SET = {
    "converter", "default_msec_format", "default_time_format", "handlers", "propagate",  # logging
    "restype",  # ctypes
    "decoder", "pre_tokenizer",  # tokenizers
    "packed_number", "kernel_weight", "weight_number",  # names of ours on vLLM's layers
    "came_as", "goes_on_behind",  # and requests
    "_replace", "_exit",  # of named tuples; os._exit
}  # fmt: skip
"""Names that none of our classes defines and no table needs."""


def own_names() -> frozenset[str]:
    """All names that our tree defines."""
    names = set()
    for path in (*PATHS, *(ROOT / "scheduler").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    names.add(name)
                case ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                    names.add(name)
                case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                    names.add(name)
    return frozenset(names)


OWN = own_names()


def private_uses(source: str, path: Path) -> Iterator[str]:
    """Each use of a private name that is neither defined in our tree nor in a table."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
                pass
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(name)), *_]):
                pass
            case ast.ImportFrom(module=str(module), names=names) if is_foreign(module):
                parts = [*module.split("."), *(alias.name for alias in names)]
                owners = {seam.owner for seam in TABLE}
                if any(part.startswith("_") for part in parts) and module not in owners:
                    yield f"{path.relative_to(ROOT)}:{node.lineno} uses {module}"
                continue
            case _:
                continue
        is_private = name.startswith("_") and not name.startswith("__")
        if is_private and name not in OWN | NAMES | MEANT_TO_BE_SET:
            yield f"{path.relative_to(ROOT)}:{node.lineno} uses {name}"


def assignments(source: str, path: Path) -> Iterator[str]:
    """Each assignment to a library's module or class, or to a member whose name is not ours."""
    tree = ast.parse(source)
    foreign = imported(tree)
    written = {seam.member for seam in TABLE if seam.use is Use.WRITTEN}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=value, attr=name, ctx=ast.Store() | ast.Del()):
                pass
            case ast.Call(func=ast.Name(id="setattr"), args=[value, *_]):
                name = "a member"
                if root_of(value) not in foreign:
                    continue
            case _:
                continue
        if root_of(value) in foreign or name not in OWN | written | MEANT_TO_BE_SET:
            yield f"{path.relative_to(ROOT)}:{node.lineno} assigns {ast.unparse(value)}.{name}"


def reads(source: str, path: Path) -> Iterator[str]:
    """Each member that is read from a parameter with the type of a library."""
    tree = ast.parse(source)
    foreign = imported(tree)
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        declared = {
            arg.arg: foreign[name.id]
            for arg in (*function.args.args, *function.args.kwonlyargs)
            if arg.annotation
            for name in ast.walk(arg.annotation)
            if isinstance(name, ast.Name) and name.id in foreign
        }
        for node in ast.walk(function):
            match node:
                case ast.Attribute(value=ast.Name(id=variable), attr=member) if cls := declared.get(
                    variable, ""
                ):
                    found = f"{cls.rpartition('.')[2]}.{member}"
                    known = member in NAMES or found in NARROWED
                    if not known and not cls.startswith(DOCUMENTED):
                        yield f"{path.relative_to(ROOT)}:{node.lineno} reads {found}"


def last_word(seam: Seam) -> str:
    return str(re.findall(r"\w+", seam.member.removesuffix('.json"'))[-1])


def is_foreign(module: str) -> bool:
    return module.split(".")[0] in LIBRARIES


def imported(tree: ast.Module) -> dict[str, str]:
    """The names that a module imports from the libraries, each with its full name."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), names=names) if is_foreign(module):
                found |= {a.asname or a.name: f"{module}.{a.name}" for a in names}
            case ast.Import(names=names):
                found |= {
                    a.asname or a.name.split(".")[0]: a.name for a in names if is_foreign(a.name)
                }
    return found


def root_of(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""
