import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.config.app_config import AppConfig

README = (Path(__file__).parents[1] / "README.md").read_text()


def keys(cls: type, prefix: str = "") -> Iterator[str]:
    for name, kind in typing.get_type_hints(cls).items():
        if name in {field.name for field in dataclasses.fields(cls)}:
            if type(None) in typing.get_args(kind):
                yield f"{prefix}{name}"
                kind = typing.get_args(kind)[0]
                if not dataclasses.is_dataclass(kind):
                    continue
            if dataclasses.is_dataclass(kind):
                yield from keys(kind, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"


@pytest.mark.parametrize("key", list(keys(AppConfig)))
def test_the_config_reference_has_every_key(key: str) -> None:
    assert f"| `{key}` |" in README


def test_the_config_reference_has_no_other_key() -> None:
    table = README.partition("## Config reference")[2].partition("\n## ")[0]
    rows = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]

    assert sorted(rows) == sorted(keys(AppConfig))
