"""What of JSON Schema the workers' grammars cannot hold an answer to.

xgrammar leaves out some keywords without a word. Found by trying each keyword of draft 2020-12;
the tests repeat that with the version installed.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Node = dict[str, Any]

FORMATS = frozenset(
    [
        "date",
        "date-time",
        "duration",
        "email",
        "hostname",
        "ipv4",
        "ipv6",
        "json-pointer",
        "relative-json-pointer",
        "time",
        "uri",
        "uri-reference",
        "uri-template",
        "uuid",
    ]
)
"""Formats of strings that are obeyed."""
NOTES = frozenset(
    [
        "binary",
        "byte",
        "directory-path",
        "file-path",
        "json-string",
        "password",
        "path",
    ]
)
"""Formats of strings that say what a string is for, and forbid none."""
UNSUPPORTED = frozenset(
    [
        "$dynamicRef",
        "$recursiveRef",
        "additionalItems",
        "contains",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "if",
        "maxContains",
        "minContains",
        "multipleOf",
        "not",
    ]
)
NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
STRINGS = ("minLength", "maxLength", "pattern", "format")
ARRAYS = ("minItems", "maxItems")
OBJECTS = ("required", "minProperties", "maxProperties", "patternProperties", "propertyNames")
TYPE_OF: Mapping[str, str] = {
    **dict.fromkeys(NUMBERS, "integer or number"),
    **dict.fromkeys(STRINGS, "string"),
    **dict.fromkeys(ARRAYS, "array"),
    **dict.fromkeys(OBJECTS, "object"),
}
"""The type that a keyword speaks of; without `type` it would be ignored."""
ALONE = ("$ref", "const", "enum", "allOf", "anyOf", "oneOf")
"""Keywords next to which all others that constrain are ignored."""
CONSTRAINING = {*TYPE_OF, *ALONE, "additionalProperties", "items", "prefixItems", "properties"}
CONSTRAINING |= {"unevaluatedItems", "unevaluatedProperties"}
OF_ONE = ("items", "additionalProperties", "propertyNames", "contains", "not", "if", "then", "else")
OF_MANY = ("prefixItems", "allOf", "anyOf", "oneOf")
OF_NAMES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

ESCAPES = re.compile(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|[dDwWsSnrtfv]|[^0-9A-Za-z])")
CLASS = re.compile(r"\[\^?(\\.|[^\]\\])+\]")


@dataclass(frozen=True, slots=True)
class Fault:
    """A keyword that would not be obeyed."""

    node: Node
    keyword: str
    reason: str
    instead: Any = None
    """Value under which the rest is obeyed; None: it must be left out."""


def first_fault(schema: Any) -> str | None:
    """Why a schema cannot be obeyed, by its path and keyword; None if it can."""
    for path, node in _nodes(schema, "#"):
        for fault in _faults(node):
            return f"`{fault.keyword}` at {path} {fault.reason}"
    return None


def enforceable(schema: Any) -> Any:
    """The schema without what would not be obeyed: wider, never narrower."""
    schema = copy.deepcopy(schema)
    for _, node in list(_nodes(schema, "#")):
        for fault in list(_faults(node)):
            if fault.instead is None:
                node.pop(fault.keyword, None)
            else:
                node[fault.keyword] = fault.instead
        if "anyOf" not in node and isinstance(node.get("oneOf"), list):
            node["anyOf"] = node.pop("oneOf")  # branches that overlap are refused
    return schema


def _nodes(schema: Any, path: str) -> Iterator[tuple[str, Node]]:
    """The schemas within a schema, but not what only looks like one: names, examples, values."""
    if not isinstance(schema, dict):
        return
    yield path, schema
    for keyword in OF_ONE:
        yield from _nodes(schema.get(keyword), f"{path}/{keyword}")
    for keyword in OF_MANY:
        if isinstance(branches := schema.get(keyword), list):
            for index, branch in enumerate(branches):
                yield from _nodes(branch, f"{path}/{keyword}/{index}")
    for keyword in OF_NAMES:
        if isinstance(named := schema.get(keyword), dict):
            for name, of_name in named.items():
                yield from _nodes(of_name, f"{path}/{keyword}/{name}")


def _faults(node: Node) -> Iterator[Fault]:
    for keyword in node:
        if keyword in UNSUPPORTED or (keyword == "uniqueItems" and node[keyword] is True):
            yield Fault(node, keyword, "is not supported")
    for rule in RULES:
        yield from rule(node)


def _types(node: Node) -> frozenset[str]:
    types = node.get("type")
    if isinstance(types, list):
        return frozenset(map(str, types))
    return frozenset([types]) if isinstance(types, str) else frozenset()


def _alone(node: Node) -> Iterator[Fault]:
    """A reference, a list of values or of branches is all that counts."""
    main = next((keyword for keyword in ALONE if keyword in node), None)
    if main is None:
        return
    others = [keyword for keyword in node if keyword in CONSTRAINING and keyword != main]
    if "properties" in others and main.endswith("Of"):
        yield Fault(node, main, "cannot stand next to `properties`")
    else:
        for keyword in others:
            yield Fault(node, keyword, f"would be ignored next to `{main}`")
    branches = node.get("allOf")
    if isinstance(branches, list) and len(branches) > 1:
        yield Fault(node, "allOf", "is supported with one branch only")


def _typed(node: Node) -> Iterator[Fault]:
    if any(keyword in node for keyword in ALONE):
        return
    if "type" in node and not _types(node):
        yield Fault(node, "type", "names no type")
    if "type" in node:
        return
    for keyword in node:
        of_type = TYPE_OF.get(keyword)
        if of_type is not None and not (of_type == "object" and "properties" in node):
            yield Fault(node, keyword, f"needs `type`: {of_type}")


def _strings(node: Node) -> Iterator[Fault]:
    of_format = node.get("format")
    is_note = isinstance(of_format, str) and of_format in NOTES
    if "string" in _types(node) and of_format is not None and str(of_format) not in FORMATS | NOTES:
        yield Fault(node, "format", f"{of_format!r} is not supported")
    if isinstance(pattern := node.get("pattern"), str) and (reason := _pattern_fault(pattern)):
        yield Fault(node, "pattern", reason)
    for shape in ("pattern", "format"):
        for length in ("minLength", "maxLength"):
            if shape in node and length in node and not is_note:
                yield Fault(node, length, f"cannot stand next to `{shape}`")
    if "pattern" in node and "format" in node and not is_note:
        yield Fault(node, "pattern", "cannot stand next to `format`")


def _arrays(node: Node) -> Iterator[Fault]:
    if isinstance(node.get("items"), list):
        yield Fault(node, "items", "must be one schema; `prefixItems` has several", {})
    if "array" in _types(node) and "items" not in node and "prefixItems" not in node:
        yield Fault(node, "items", "must say what is in the array", {})


def _objects(node: Node) -> Iterator[Fault]:
    properties = node.get("properties")
    known = properties if isinstance(properties, dict) else {}
    required = node.get("required")
    listed = required if isinstance(required, list) else []
    if unknown := [name for name in listed if not isinstance(name, str) or name not in known]:
        instead = [name for name in listed if name not in unknown] or None
        yield Fault(node, "required", f"names {unknown[0]!r}, which `properties` lacks", instead)
    if not known and node.get("additionalProperties", False) is False and "minProperties" in node:
        yield Fault(node, "minProperties", "needs `properties` or `additionalProperties`")
    patterns, names = node.get("patternProperties"), node.get("propertyNames")
    if isinstance(patterns, dict) and (known or len(patterns) > 1):
        yield Fault(node, "patternProperties", "is supported alone and with one pattern only")
    if isinstance(names, dict) and (known or patterns is not None):
        yield Fault(node, "propertyNames", "cannot stand next to other properties")


def _numbers(node: Node) -> Iterator[Fault]:
    for keyword in ("exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(node.get(keyword), bool):
            yield Fault(node, keyword, "must be a number")


def _references(node: Node) -> Iterator[Fault]:
    reference = node.get("$ref")
    if reference is not None and not str(reference).startswith("#/") and reference != "#":
        yield Fault(node, "$ref", "must point into this schema: `#` or `#/...`")


def _pattern_fault(pattern: str) -> str | None:
    """What xgrammar does not know in a regex, or would leave out."""
    plain = CLASS.sub("c", ESCAPES.sub("e", pattern))
    if "\\" in plain:
        return f"has an escape that is not supported: {plain[plain.index(chr(92)) :][:2]}"
    if re.search(r"\(\?(?!:)", plain):
        return "has a group that is not supported: only `(...)` and `(?:...)` are"
    if re.search(r"[^(|]\^|\$[^)|]", plain):
        return "has an anchor in its middle"
    return None


RULES: tuple[Callable[[Node], Iterator[Fault]], ...] = (
    _alone,
    _typed,
    _strings,
    _arrays,
    _objects,
    _numbers,
    _references,
)
