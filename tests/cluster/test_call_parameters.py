"""What a client handle sends: JSON of Python's, pydantic's and numpy's values, or an error."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pydantic
import pytest

from cluster.call_parameters import encode_parameters
from cluster.errors import RequestFailed


class Place(pydantic.BaseModel):
    city: str
    people: int | None = None


@dataclasses.dataclass
class City:
    name: str


class Recursive(list[Any]):
    """A list that holds itself."""

    def __init__(self) -> None:
        super().__init__([self])


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        ({1: 2}, {"1": 2}),
        ((1, "x", None), [1, "x", None]),
        (range(3), [0, 1, 2]),
        (iter([Place(city="Rome")]), [{"city": "Rome"}]),
        (City("Rome"), {"name": "Rome"}),
        (np.array([1, 2]), [1, 2]),
        (np.float32(0.5), 0.5),
        (math.inf, math.inf),
        ("\ud800", "\ud800"),
        (10**30, 10**30),
    ],
)
def test_a_value_is_sent_as_json(value: Any, sent: Any) -> None:
    assert json.loads(encode_parameters({"a": value, "b": 1})) == {"a": sent, "b": 1}


@pytest.mark.parametrize("value", [object(), print, Place, {(1,): 2}, b"\xff", Recursive()])
def test_what_json_cannot_hold_is_named(value: Any) -> None:
    with pytest.raises(RequestFailed, match=r"^a: it cannot be sent as JSON: ") as raised:
        encode_parameters({"a": value})

    assert raised.value.status == 400


@pytest.mark.parametrize(
    ("wanted", "name", "schema"),
    [
        (City, "City", {"title": "City", "type": "object", "required": ["name"]}),
        (list[int], "list", {"type": "array", "items": {"type": "integer"}}),
        (str | int, "answer", {"anyOf": [{"type": "string"}, {"type": "integer"}]}),
    ],
)
def test_a_type_is_sent_as_its_schema(wanted: Any, name: str, schema: dict[str, Any]) -> None:
    sent = json.loads(encode_parameters({"response_format": wanted}))["response_format"]

    assert (sent["type"], sent["json_schema"]["name"]) == ("json_schema", name)
    assert sent["json_schema"]["schema"].items() >= schema.items()


def test_a_type_without_a_schema_is_refused() -> None:
    with pytest.raises(RequestFailed, match=r"^response_format: dict has no JSON schema: "):
        encode_parameters({"response_format": dict[str, type(print)]})  # type: ignore[misc]


def test_a_model_is_sent_as_a_tool() -> None:
    own = {"type": "function", "function": {"name": "own"}}

    [sent, same] = json.loads(encode_parameters({"tools": [Place, own]}))["tools"]

    assert sent["function"]["name"] == "Place"
    assert sent["function"]["parameters"]["required"] == ["city", "people"]
    assert same == own
