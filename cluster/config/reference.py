"""The reference of the app's config, made from the config's dataclasses and their docstrings.

`python -m cluster.config.reference` writes it into deploy/README.md, and the table of the HTTP
routes into cluster/README.md; tests compare them.
"""

import ast
import dataclasses
import inspect
import json
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any

from cluster.config import routes
from cluster.config.app_config import AppConfig

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "deploy" / "README.md"
BEGIN = "<!-- The config reference: written by `make docs` from the config's dataclasses. -->\n"
END = "<!-- End of the config reference. -->\n"

ROUTES_README = ROOT / "cluster" / "README.md"
ROUTES_BEGIN = "<!-- The routes: written by `make docs` from cluster/config/routes.py. -->\n"
ROUTES_END = "<!-- End of the routes. -->\n"

KINDS = {bool: "boolean", int: "integer", float: "number", str: "string"}
"""Types by the words for them in YAML."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the config."""

    name: str
    type: str
    default: str
    meaning: str

    def row(self) -> str:
        """The key as a row of a Markdown table."""
        return f"| `{self.name}` | {self.type} | {self.default} | {self.meaning} |\n"


def reference() -> str:
    """A table of keys for each dataclass of the config, as Markdown."""
    return "\n".join(
        f"{place}: {_docs(cls)['']}\n\n| key | type | default | meaning |\n|---|---|---|---|\n"
        + "".join(key.row() for key in keys)
        for place, cls, keys in _sections("", AppConfig)
    )


def current(text: str) -> str:
    """The text of a README with the reference in it as it should be; ValueError without a place."""
    return _filled(text, BEGIN, reference(), END)


def with_routes(text: str) -> str:
    """The same with the table of the routes."""
    return _filled(text, ROUTES_BEGIN, routes.table(), ROUTES_END)


def _filled(text: str, begin: str, content: str, end: str) -> str:
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"the README needs the lines {begin!r} and {end!r}, in this order")
    return f"{before}{begin}\n{content}\n{end}{after}"


def _sections(prefix: str, cls: type) -> Iterator[tuple[str, type, list[Key]]]:
    """Each dataclass below `cls` with its place and its keys, `cls` itself first."""
    docs, keys, inner = _docs(cls), [], []
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, type_ = f"{prefix}{field.name}", types[field.name]
        if (config := _config_in(type_)) is not None:
            of_each = "NAME." if typing.get_origin(type_) is dict else ""
            inner.append((f"{name}.{of_each}", config))
        if config is not type_:
            keys.append(Key(name, _type(type_), _default(field), docs[field.name]))
    yield f"`{prefix.removesuffix('.')}`" if prefix else "`args`", cls, keys
    for inner_prefix, config in inner:
        yield from _sections(inner_prefix, config)


def _config_in(type_: Any) -> type | None:
    """The dataclass that a field holds: itself, or null, or one for each name."""
    if isinstance(type_, type) and dataclasses.is_dataclass(type_):
        return type_
    return next(filter(None, map(_config_in, typing.get_args(type_))), None)


def _type(type_: Any) -> str:
    """A type in the words of YAML."""
    origin, args = typing.get_origin(type_), typing.get_args(type_)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin is UnionType:
        return " or ".join(_type(arg) for arg in args if arg is not type(None)) + " or null"
    if origin is tuple:
        return f"list of {_type(args[0])}"
    if isinstance(type_, type) and issubclass(type_, Enum):
        return ", ".join(f"`{member}`" for member in type_)
    if origin is dict or dataclasses.is_dataclass(type_):
        return "mapping"
    return KINDS[type_]


def _default(field: "dataclasses.Field[Any]") -> str:
    """The default of a field as one would write it in YAML."""
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value is MISSING:
        return "required"
    if isinstance(value, tuple):
        return f"`[{', '.join(value)}]`"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _docs(cls: type) -> dict[str, str]:
    """The first paragraph of a dataclass's docstring, under "", and those of its fields.

    Python drops the docstrings of fields, so they are read from the source. ValueError names a
    field that has none.
    """
    [definition] = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    body = definition.body
    docs = {"": _flat(cls.__doc__ or "")}
    for item, below in zip(body, [*body[1:], None], strict=True):
        if not (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)):
            continue
        match below:
            case ast.Expr(value=ast.Constant(value=str(text))):
                docs[item.target.id] = _flat(text)
            case _ if _config_in(typing.get_type_hints(cls)[item.target.id]) is None:
                raise ValueError(f"{cls.__name__}.{item.target.id} has no docstring")
    return docs


def _flat(text: str) -> str:
    """The first paragraph of a docstring as one line of a table."""
    return " ".join(text.partition("\n\n")[0].split()).replace("|", "\\|")


if __name__ == "__main__":
    README.write_text(current(README.read_text()))
    ROUTES_README.write_text(with_routes(ROUTES_README.read_text()))
