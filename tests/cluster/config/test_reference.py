from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from cluster.config import reference
from cluster.config.reference import (
    BEGIN,
    END,
    README,
    ROUTES_README,
    Key,
    current,
    with_routes,
)


@dataclass(frozen=True)
class Inner:
    """What is inside.

    This paragraph is left out.
    """

    ratio: float
    """A share, 0|1."""


@dataclass(frozen=True)
class Outer:
    """What is around it."""

    inner: Inner
    maybe: Inner | None = None
    """One more."""
    named: dict[str, Inner] = field(default_factory=dict)
    """Some by
    name."""
    names: tuple[Literal["a", "b"], ...] = ("a", "b")
    """Two."""
    count: int | None = None
    """A number."""
    further: dict[str, Any] = field(default_factory=dict)
    """Anything."""


@dataclass(frozen=True)
class Untold:
    """A config with a key that nobody knows."""

    key: int = 1


def test_the_readme_has_the_reference_of_the_config() -> None:
    text = README.read_text()

    assert text == current(text), "run `make docs`"


def test_the_readme_of_the_cluster_has_the_table_of_the_routes() -> None:
    text = ROUTES_README.read_text()

    assert text == with_routes(text), "run `make docs`"


def test_each_config_is_a_section_of_its_own_keys() -> None:
    ratio = "number", "required", "A share, 0\\|1."

    assert list(reference._sections("", Outer)) == [
        (
            "`args`",
            Outer,
            [
                Key("maybe", "mapping or null", "`null`", "One more."),
                Key("named", "mapping", "`{}`", "Some by name."),
                Key("names", "list of `a`, `b`", "`[a, b]`", "Two."),
                Key("count", "integer or null", "`null`", "A number."),
                Key("further", "mapping", "`{}`", "Anything."),
            ],
        ),
        ("`inner`", Inner, [Key("inner.ratio", *ratio)]),
        ("`maybe`", Inner, [Key("maybe.ratio", *ratio)]),
        ("`named.NAME`", Inner, [Key("named.NAME.ratio", *ratio)]),
    ]


def test_a_section_begins_with_the_first_paragraph_of_its_docstring() -> None:
    assert reference._docs(Inner)[""] == "What is inside."


def test_a_key_without_a_docstring_is_named() -> None:
    with pytest.raises(ValueError, match=r"Untold\.key has no docstring"):
        reference._docs(Untold)


@pytest.mark.parametrize("text", ["", BEGIN, END, END + BEGIN])
def test_a_readme_without_a_place_for_it_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="needs the lines"):
        current(text)


def test_the_rest_of_the_readme_stays() -> None:
    once = current(f"before\n{BEGIN}old\n{END}after\n")

    assert once.startswith(f"before\n{BEGIN}\n`args`: ")
    assert once.endswith(f" |\n\n{END}after\n")
    assert current(once) == once
