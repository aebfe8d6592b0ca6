"""JSON Schema: what is accepted is obeyed, keyword by keyword, with the grammars installed."""

import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from cluster.ingress.json_schema import enforceable, first_fault
from tests.workers.byte_grammars import TOKENIZER, matches, sample
from workers.config import WorkerConfig
from workers.engine.vllm_grammars import GrammarCompiler
from workers.errors import GrammarRefused

INTEGER = {"type": "integer"}
STRING = {"type": "string"}
POINT = {
    "type": "object",
    "properties": {"x": INTEGER, "y": INTEGER},
    "required": ["x", "y"],
    "additionalProperties": False,
}


def properties(**more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": INTEGER, "b": STRING}} | more


OBEYED: dict[str, Any] = {
    "true": True,
    "type": {"type": ["string", "null"]},
    "const": {"const": {"a": 1}},
    "enum": {"type": "string", "enum": ["a", "b"]},
    "minimum": {"type": "integer", "minimum": 5},
    "maximum": {"type": "number", "maximum": 2.5},
    "exclusiveMinimum": {"type": "number", "exclusiveMinimum": 0},
    "exclusiveMaximum": {"type": "integer", "exclusiveMaximum": 5},
    "both bounds": {"type": "integer", "minimum": 3, "maximum": 7},
    "minLength": {"type": "string", "minLength": 2},
    "maxLength": {"type": ["string", "null"], "maxLength": 3},
    "pattern": {"type": "string", "pattern": "^[a-z]{2,4}-\\d+$"},
    "pattern without anchors": {"type": "string", "pattern": "[0-9]"},
    "pattern of two ends": {"type": "string", "pattern": "^a|b$"},
    "format": {"type": "string", "format": "uuid"},
    "format email": {"type": "string", "format": "email"},
    "format as a note": {"type": "string", "format": "password", "maxLength": 4},
    "format of a number": {"type": "integer", "format": "int32"},
    "properties": properties(),
    "properties alone": {"properties": {"a": INTEGER}, "required": ["a"]},
    "required": properties(required=["b"]),
    "additionalProperties": properties(additionalProperties=INTEGER),
    "additionalProperties alone": {"type": "object", "additionalProperties": INTEGER},
    "minProperties": properties(minProperties=2),
    "maxProperties": properties(maxProperties=1),
    "patternProperties": {
        "type": "object",
        "patternProperties": {"^x$": INTEGER},
        "additionalProperties": False,
    },
    "propertyNames": {"type": "object", "propertyNames": {"enum": ["a", "b"]}},
    "unevaluatedProperties": properties(unevaluatedProperties=False),
    "items": {"type": "array", "items": INTEGER},
    "items false": {"type": "array", "items": False},
    "prefixItems": {"type": "array", "prefixItems": [INTEGER, STRING], "items": False},
    "minItems": {"type": "array", "items": INTEGER, "minItems": 2},
    "maxItems": {"type": "array", "items": INTEGER, "maxItems": 2},
    "unevaluatedItems": {"type": "array", "prefixItems": [INTEGER], "unevaluatedItems": False},
    "uniqueItems false": {"type": "array", "items": INTEGER, "uniqueItems": False},
    "anyOf": {"anyOf": [POINT, {"type": "null"}]},
    "oneOf": {"oneOf": [INTEGER, STRING]},
    "allOf": {"allOf": [POINT]},
    "$ref": {"$ref": "#/$defs/A", "description": "a", "$defs": {"A": POINT}},
    "definitions": {"$ref": "#/definitions/A", "definitions": {"A": POINT}},
    "recursion": {
        "type": "object",
        "properties": {"v": INTEGER, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["v", "next"],
    },
    "annotations": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://example.com/a",
        "$comment": "a",
        "title": "not",
        "description": "a",
        "default": 3,
        "examples": [{"multipleOf": 3}],
        "deprecated": True,
        "readOnly": True,
        "writeOnly": False,
        "x-ours": 1,
        **INTEGER,
    },
    "content": {
        "type": "string",
        "maxLength": 5,
        "contentEncoding": "base64",
        "contentMediaType": "application/json",
        "contentSchema": INTEGER,
    },
    "names that look like keywords": {
        "type": "object",
        "properties": {"not": INTEGER, "if": STRING, "multipleOf": INTEGER},
    },
}
IGNORED: dict[str, tuple[str, Any]] = {
    "multipleOf": ("multipleOf", {"type": "integer", "multipleOf": 3}),
    "uniqueItems": ("uniqueItems", {"type": "array", "items": INTEGER, "uniqueItems": True}),
    "contains": ("contains", {"type": "array", "items": {}, "contains": INTEGER}),
    "minContains": ("minContains", {"type": "array", "items": INTEGER, "minContains": 2}),
    "maxContains": ("maxContains", {"type": "array", "items": INTEGER, "maxContains": 2}),
    "additionalItems": ("additionalItems", {"type": "array", "items": INTEGER}),
    "not": ("not", {"type": "string", "not": {"const": "a"}}),
    "if": ("if", properties(**{"if": {"required": ["a"]}, "then": {"required": ["b"]}})),
    "dependentRequired": ("dependentRequired", properties(dependentRequired={"a": ["b"]})),
    "dependentSchemas": ("dependentSchemas", properties(dependentSchemas={"a": POINT})),
    "dependencies": ("dependencies", properties(dependencies={"a": ["b"]})),
    "$dynamicRef": ("$dynamicRef", {"$dynamicRef": "#a"}),
    "$recursiveRef": ("$recursiveRef", {"$recursiveRef": "#"}),
    "$ref elsewhere": ("$ref", {"$ref": "https://example.com/a"}),
    "$ref to an anchor": ("$ref", {"$ref": "#a", "$defs": {"A": {"$anchor": "a"}}}),
    "beside $ref": ("minimum", {"$ref": "#/$defs/A", "minimum": 5, "$defs": {"A": INTEGER}}),
    "beside enum": ("pattern", {"type": "string", "enum": ["a", "b"], "pattern": "^a$"}),
    "beside anyOf": ("minimum", {"anyOf": [INTEGER, STRING], "minimum": 5}),
    "anyOf beside properties": ("anyOf", properties(anyOf=[POINT])),
    "allOf of two": ("allOf", {"allOf": [INTEGER, {"type": "integer", "minimum": 3}]}),
    "no type: number": ("minimum", {"minimum": 5}),
    "no type: string": ("minLength", {"minLength": 5}),
    "no type: pattern": ("pattern", {"pattern": "^a$"}),
    "no type: format": ("format", {"format": "date"}),
    "no type: array": ("minItems", {"minItems": 1}),
    "no type: object": ("required", {"required": ["a"]}),
    "no type: names": ("propertyNames", {"propertyNames": {"enum": ["a"]}}),
    "type of nothing": ("type", {"type": []}),
    "pattern and length": ("maxLength", {"type": "string", "pattern": "^a+$", "maxLength": 2}),
    "format and length": ("maxLength", {"type": "string", "format": "uri", "maxLength": 5}),
    "format unknown": ("format", {"type": "string", "format": "idn-email"}),
    "pattern that looks ahead": ("pattern", {"type": "string", "pattern": "^(?!a).$"}),
    "pattern with an anchor": ("pattern", {"type": "string", "pattern": "^a$b$"}),
    "pattern with a boundary": ("pattern", {"type": "string", "pattern": "^a\\b.$"}),
    "pattern with a reference": ("pattern", {"type": "string", "pattern": "^(a|b)\\1$"}),
    "pattern with a class": ("pattern", {"type": "string", "pattern": "^\\p{L}$"}),
    "pattern with a flag": ("pattern", {"type": "string", "pattern": "(?i)^a$"}),
    "required but unknown": ("required", properties(required=["a", "c"])),
    "properties by patterns": ("patternProperties", properties(patternProperties={"^x": STRING})),
    "names and properties": ("propertyNames", properties(propertyNames={"minLength": 3})),
    "items of several": ("items", {"type": "array", "items": [INTEGER, STRING]}),
    "items of nothing": ("items", {"type": "array"}),
    "draft 4": ("exclusiveMinimum", {"type": "integer", "exclusiveMinimum": True}),
}
IGNORED["additionalItems"][1]["additionalItems"] = STRING

PYDANTIC = {
    "$defs": {
        "Address": {
            "properties": {
                "street": {"title": "Street", "type": "string"},
                "zip": {"pattern": "^[0-9]{5}$", "title": "Zip", "type": "string"},
            },
            "required": ["street", "zip"],
            "title": "Address",
            "type": "object",
        },
        "Kind": {"enum": ["a", "b"], "title": "Kind", "type": "string"},
    },
    "properties": {
        "age": {"maximum": 150, "minimum": 0, "title": "Age", "type": "integer"},
        "address": {"$ref": "#/$defs/Address"},
        "kind": {"$ref": "#/$defs/Kind", "default": "a", "description": "which"},
        "nick": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
        "tags": {"items": {"type": "string"}, "minItems": 1, "title": "Tags", "type": "array"},
        "born": {"format": "date-time", "title": "Born", "type": "string"},
        "site": {"format": "uri", "minLength": 1, "type": "string"},
    },
    "required": ["age", "address"],
    "title": "Person",
    "type": "object",
}


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(TOKENIZER, WorkerConfig())
    yield compiler
    compiler.close()


@pytest.mark.parametrize("name", OBEYED)
def test_what_is_accepted_is_obeyed(compiler: GrammarCompiler, name: str) -> None:
    schema = OBEYED[name]
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    draw = random.Random(name)

    assert first_fault(schema) is None
    compiled = compiler.compile_json_schema(json.dumps(schema))
    texts = [text for _ in range(60) if (text := sample(compiled, draw)) is not None]

    assert texts
    assert [text for text in texts if not validator.is_valid(json.loads(text))] == []


@pytest.mark.parametrize("name", IGNORED)
def test_what_would_be_ignored_is_refused_by_name(name: str) -> None:
    keyword, schema = IGNORED[name]

    assert (first_fault(schema) or "").startswith(f"`{keyword}` at # ")
    assert (first_fault({"anyOf": [POINT, schema]}) or "").startswith(f"`{keyword}` at #/anyOf/1 ")


@pytest.mark.parametrize("name", IGNORED)
def test_what_would_be_ignored_can_be_left_out(compiler: GrammarCompiler, name: str) -> None:
    schema = IGNORED[name][1]
    before = json.dumps(schema)

    wider = enforceable(schema)

    assert json.dumps(schema) == before
    assert first_fault(wider) is None
    assert compiler.compile_json_schema(json.dumps(wider)).memory_size_bytes > 0


def test_what_is_obeyed_is_not_left_out() -> None:
    same = {name: schema for name, schema in OBEYED.items() if name != "oneOf"}

    assert {name: enforceable(schema) for name, schema in same.items()} == same


def test_required_names_are_kept_as_far_as_they_are_known() -> None:
    assert enforceable(properties(required=["b", "c"]))["required"] == ["b"]


def test_branches_that_overlap_are_refused_or_taken_as_any_of_them(
    compiler: GrammarCompiler,
) -> None:
    schema = {"oneOf": [INTEGER, {"type": "number"}]}

    assert first_fault(schema) is None
    with pytest.raises(GrammarRefused, match="oneOf"):
        compiler.compile_json_schema(json.dumps(schema))
    assert matches(compiler.compile_json_schema(json.dumps(enforceable(schema))), "1.5")


def test_a_schema_of_pydantic_is_accepted_but_for_the_length_of_a_format(
    compiler: GrammarCompiler,
) -> None:
    assert first_fault(PYDANTIC) == (
        "`minLength` at #/properties/site cannot stand next to `format`"
    )
    assert first_fault(enforceable(PYDANTIC)) is None
    assert compiler.compile_json_schema(json.dumps(enforceable(PYDANTIC))).memory_size_bytes > 0
