"""Seams: members of another library that we use although it does not promise to keep them.

A table names each of them with what we expect of it. It is checked when an engine or a front end
starts, so that another version of the library is an error that says what has changed, not a
puzzle in the middle of a request.
"""

import dis
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib import metadata
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

LAZILY: dict[str, Any] = {}
"""Arguments of `inspect.signature`; from Python 3.14 on they leave annotations unevaluated."""
if sys.version_info >= (3, 14):
    import annotationlib

    LAZILY["annotation_format"] = annotationlib.Format.FORWARDREF

MAX_NAMED = 8
"""Max differences that one error names; the first ones say enough."""


class Use(StrEnum):
    """How we use a member; if in several ways, the one that depends most on the library."""

    READ = "read"
    WRITTEN = "written"
    CALLED = "called"
    OVERRIDDEN = "overridden"
    REPLACED = "replaced"
    NAMED = "named"
    """Text in the library's source: the name of an environment variable, or of a member that the
    library looks up on an object of ours."""


@dataclass(frozen=True, slots=True)
class Seam:
    """One member of another library, and what we expect of it."""

    owner: str
    """A module, or `module:Class`."""
    member: str
    use: Use
    expected: str = ""
    """Parameters, `(self, request, *, drop_stale_output=False)`, or the type in the declaration of
    a field; empty: the member must only be there."""

    def __str__(self) -> str:
        return f"{self.owner.replace(':', '.')}.{self.member}"

    def fault(self) -> str | None:
        """A sentence on how the library installed differs; None if it does not."""
        if self.use is Use.NAMED:
            return None if self.member in _source(self.owner) else f"{self} is not named any more"
        try:
            owner = _resolve(self.owner)
        except (ImportError, AttributeError) as error:
            return f"{self} is gone ({error})"
        if not has_member(owner, self.member):
            return f"{self} is gone"
        found = described(owner, self.member)
        if not self.expected or self.expected == found or self._accepts(found):
            return None
        return f"{self} is `{found}`, expected `{self.expected}`"

    def _accepts(self, found: str) -> bool:
        """Whether only optional parameters are new, which a function that we call may have."""
        expected = self.expected[1:-1].split(", ")
        needed = [
            parameter
            for parameter in found[1:-1].split(", ")
            if parameter in expected or not (parameter == "*" or "=" in parameter)
        ]
        return self.use is Use.CALLED and needed == expected


def seams(table: str) -> tuple[Seam, ...]:
    """The rows of a table in text form.

    An owner stands at the beginning of a line; below it, indented by four, how we use some of its
    members: `called name(parameters)`, `read name: type`, or `read name name name`. Lines that are
    indented by more continue the line before; `#` begins a comment.
    """
    rows: list[Seam] = []
    owner = ""
    for line in re.sub(r"\n {5,}", " ", table).splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if not line.startswith(" "):
            owner = line
            continue
        use, _, members = line.strip().partition(" ")
        rows += (Seam(owner, *row) for row in _members(Use(use), members))
    return tuple(rows)


def _members(use: Use, text: str) -> Iterator[tuple[str, Use, str]]:
    """Name, use and what is expected of each member on one line of a table."""
    if use is Use.NAMED:
        yield text, use, ""
    elif "(" in text:
        name, _, parameters = text.partition("(")
        yield name, use, f"({parameters}"
    elif ": " in text:
        name, _, declared = text.partition(": ")
        yield name, use, declared
    else:
        yield from ((name, use, "") for name in text.split())


class SeamBroken(RuntimeError):
    """A library is not the one that XY-Serve is written for."""


@dataclass(frozen=True, slots=True)
class SeamTable:
    """The seams with one library."""

    library: str
    packages: tuple[str, ...]
    """Distributions that the library comes as; one of them is installed."""
    version: str
    """The pinned version; others with the same major and minor are accepted, too."""
    remedy: str
    """Advice that ends an error: how to install the pinned version."""
    seams: tuple[Seam, ...]

    def check(self) -> None:
        """Raise SeamBroken if the version installed is of another series, or any seam differs."""
        version = self._installed()
        if not is_same_series(version, self.version):
            raise SeamBroken(
                f"{self.library} {version} is installed, and XY-Serve is written for "
                f"{self.version}; {self.remedy}"
            )
        faults = [fault for seam in self.seams if (fault := seam.fault())]
        if faults:
            more = f"; and {len(faults) - MAX_NAMED} more" if len(faults) > MAX_NAMED else ""
            raise SeamBroken(
                f"{self.library} {version} is installed and differs from {self.version}, which "
                f"XY-Serve is written for: {'; '.join(faults[:MAX_NAMED])}{more}; {self.remedy}"
            )

    @contextmanager
    def replaced(self, owner: object, member: str, new: object) -> Iterator[None]:
        """Put `new` in the place of a member of a module, a class or an object for a while."""
        had = member in vars(owner)
        before = vars(owner).get(member)
        self.replace(owner, member, new)
        try:
            yield
        finally:
            if had:
                setattr(owner, member, before)
            else:
                delattr(owner, member)

    def replace(self, owner: object, member: str, new: object) -> None:
        """Put `new` in the place of a member for good; ValueError if the table has no such row."""
        names = _names(owner)
        if not any(
            seam.use is Use.REPLACED and seam.member == member and seam.owner in names
            for seam in self.seams
        ):
            raise ValueError(
                f"{member!r} of {names[0]} is replaced, but no seam with {self.library} says so; "
                "add one to the table"
            )
        setattr(owner, member, new)

    def _installed(self) -> str:
        for package in self.packages:
            try:
                return metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        return "(none)"


def is_same_series(version: str, other: str) -> bool:
    """Whether two versions agree in major and minor."""
    return version.split(".")[:2] == other.split(".")[:2]


def has_member(owner: object, member: str) -> bool:
    """Whether an owner has a member, or a class gives it to each of its objects."""
    if hasattr(owner, member):
        return True
    return isinstance(owner, type) and any(
        member in _declared(cls) or _assigns(cls, member) for cls in owner.__mro__
    )


def described(owner: object, member: str) -> str:
    """A member's parameters or its declared type, as tables have them; else empty."""
    value = getattr(owner, member, None)
    if callable(value):
        return _parameters(value)
    for cls in owner.__mro__ if isinstance(owner, type) else ():
        if (declared := _declared(cls).get(member)) is not None:
            return inspect.formatannotation(declared).strip("'")
    return ""


def _parameters(function: Any) -> str:
    """The parameters without their types, which may become more exact at any time."""
    try:
        signature = inspect.signature(function, **LAZILY)
    except (TypeError, ValueError):  # not written in Python
        return ""
    plain = []
    for parameter in signature.parameters.values():
        default = parameter.default
        if default is not parameter.empty and type(default) not in PLAIN:
            default = _OTHER
        plain.append(parameter.replace(annotation=parameter.empty, default=default))
    return str(inspect.Signature(plain))


def _declared(cls: type) -> dict[str, Any]:
    """The annotations in the body of a class."""
    if sys.version_info >= (3, 14):
        return annotationlib.get_annotations(cls, format=annotationlib.Format.FORWARDREF)
    return inspect.get_annotations(cls)


PLAIN = (type(None), bool, int, float, str)
"""Defaults that tables show as they are; others are shown as `...`."""


class _Other:
    def __repr__(self) -> str:
        return "..."


_OTHER = _Other()


def _assigns(cls: type, member: str) -> bool:
    """Whether a method of a class, those of its bases left out, assigns a member on `self`."""
    methods = map(inspect.unwrap, filter(callable, vars(cls).values()))
    return any(
        isinstance(method, FunctionType)
        and member in method.__code__.co_names
        and member in _assigned_by(method)
        for method in methods
    )


@cache
def _assigned_by(method: FunctionType) -> frozenset[str]:
    """Names that a method assigns on `self`, by its byte code: reading sources takes too long."""
    names = set()
    target: Any = None
    for instruction in dis.get_instructions(method):
        if instruction.opname == "EXTENDED_ARG":  # a part of the next one
            continue
        # Newer Pythons load two names by one instruction, the object of the assignment last.
        if instruction.opname == "STORE_ATTR" and (
            target == "self" or (isinstance(target, tuple) and target[-1] == "self")
        ):
            names.add(instruction.argval)
        target = instruction.argval
    return frozenset(names)


def _resolve(owner: str) -> object:
    module, _, name = owner.partition(":")
    found: object = importlib.import_module(module)
    return getattr(found, name) if name else found


def _source(module: str) -> str:
    """The source of a module, which need not be imported; empty if there is none."""
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:
        return ""
    return Path(spec.origin).read_text() if spec and spec.origin else ""


def _names(owner: object) -> list[str]:
    """What a table calls an owner: a module, a class with its bases, or those of an object."""
    if isinstance(owner, ModuleType):
        return [owner.__name__]
    cls = owner if isinstance(owner, type) else type(owner)
    return [f"{base.__module__}:{base.__qualname__}" for base in cls.__mro__]
