"""Enumerations whose members carry the words that users read."""

from enum import StrEnum
from typing import Self


class Worded(StrEnum):
    """A value for metrics and records, whose `text` says the same in words, for people.

    A member is defined as a pair: `TIME = "time", "the step was as long as ..."`.
    """

    text: str

    def __new__(cls, value: str, text: str = "") -> Self:
        """Create a member; type checkers also see a look-up by value here, hence the default."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.text = text
        return member
