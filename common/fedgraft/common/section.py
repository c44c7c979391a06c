"""The base of all sections of files that people write."""

import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

__all__ = ["Cache", "Duration", "IllegalJob", "Refuses", "Section", "Size", "UnknownKey"]

NUMBERS = (int, float, int | None, float | None)
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _seconds(value: object) -> object:
    """Return the seconds of ``"90s"``, ``"30m"``, ``"2h"``, ``"1d"`` or a number of seconds."""
    if isinstance(value, str) and (
        match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd])\s*", value)
    ):
        return float(match[1]) * _UNITS[match[2]]
    if isinstance(value, str):
        raise ValueError('write a duration as "90s", "30m", "2h" or "1d"')
    return value


Duration = Annotated[float, BeforeValidator(_seconds), Field(gt=0)]


Refuses = Mapping[str, tuple[str, str]]
"""The settings that do not work with something: for a feature's name, the reason and a hint.

The features are those of ``config/compatibility.py``. Both texts are patterns of ``str.format``:
``{task}``, ``{rule}`` and ``{method}`` are names, ``{beside}`` is the feature, ``{rules_of_sums}``
lists the rules that need only sums, and ``{largest_rank}`` is the largest of ``simulation.ranks``.
A brace that stays a brace is written twice, as ``{{`` or ``}}``.
"""


class IllegalJob(ValueError):
    """Values that are valid alone but impossible together; ``hint`` is the change to make."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.hint = hint


class UnknownKey(IllegalJob):
    """A key that no section and no task has; the text names it in full."""


class Section(BaseModel):
    """A frozen section; an unknown key is an error, not a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _true_is_not_1(cls, values: object) -> object:
        for key, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(key)
            if isinstance(value, bool) and field and field.annotation in NUMBERS:
                said = str(value).lower()
                raise IllegalJob(f"{key} = {said}: a number is wanted", f"mend {key}")
        return values


def _bytes(value: object) -> object:
    """Return the bytes of ``"64MB"``, ``"4GB"`` (decimal units) or a number of bytes."""
    if isinstance(value, str) and (
        match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?B)\s*", value)
    ):
        return int(float(match[1]) * 1000 ** ("", "k", "M", "G", "T").index(match[2][:-1]))
    if isinstance(value, str):
        raise ValueError('write a size as "64MB" or "4GB"')
    return value


Size = Annotated[int, BeforeValidator(_bytes), Field(ge=0)]


class Cache(Section):
    """The limits in bytes for data that is kept to save time; they never change a result.

    ``memory`` is the limit of a process for encoded examples and activations of frozen layers.
    ``disk`` is the limit for the files that keep them from run to run.
    """

    memory: Size = 256_000_000
    disk: Size = 4_000_000_000
