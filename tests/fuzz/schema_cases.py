"""Requests that the server's own OpenAPI schema describes, valid and not, to every route.

For routes that need more to get past the first check, a few fields are put into a valid body.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import httpx
import hypothesis
import schemathesis
from hypothesis import strategies as st

from tests.fuzz.parameters import MOST, VALID, bounded, generated

WITHOUT_BODY = 10
"""Requests of each kind to a route that takes no body."""


def make_cases(url: str, model: str, paths: Sequence[str], number: int, seed: int) -> Iterator[Any]:
    """Requests to these paths, about as many to each: valid and not, streamed and whole."""
    schema = schemathesis.openapi.from_dict(few_fields(httpx.get(f"{url}/openapi.json").json()))
    schema.config.update(base_url=url)
    chosen = [path for path in schema if not paths or path in paths]
    operations = [schema[path][method] for path in chosen for method in schema[path]]
    kinds = [(each, mode) for each in operations for mode in schemathesis.GenerationMode]
    share = -(-number // sum(bool(operation.body) for operation, _ in kinds))
    for operation, mode in kinds:
        valid = {"model": model} | VALID[operation.path] if operation.path in VALID else None
        few = min(share, WITHOUT_BODY)
        yield from _cases(operation, mode, valid, share if operation.body else few, seed)


def few_fields(document: dict[str, Any]) -> dict[str, Any]:
    """The API's schema, but of the bodies with a valid one only some fields, which are put in."""
    schemas = document["components"]["schemas"]
    for path in VALID.keys() & document["paths"].keys():
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        for reference in body["schema"].get("anyOf", [body["schema"]]):
            request = schemas[reference["$ref"].rpartition("/")[2]]
            request |= {"required": [], "additionalProperties": False}
            request |= {"minProperties": 1, "maxProperties": 3}
    return document


def _cases(
    operation: Any,
    mode: schemathesis.GenerationMode,
    valid: dict[str, Any] | None,
    number: int,
    seed: int,
) -> list[Any]:
    """Requests to one route; where a valid body is known most have it, with other fields."""
    found = []

    @generated(number, seed)
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode), data=st.data())
    def collect(case: Any, data: st.DataObject) -> None:
        if isinstance(case.body, dict):
            fixed = valid | {"stream": data.draw(st.booleans())} if valid else {"max_tokens": MOST}
            case.body = bounded(fixed | case.body)
        found.append(case)

    with suppress(hypothesis.errors.Unsatisfiable):  # a route without parameters has no wrong ones
        collect()
    return found
