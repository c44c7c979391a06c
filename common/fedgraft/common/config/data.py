"""``[data]``: the format of every site's rows."""

import difflib
import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from fedgraft.common.section import IllegalJob, Section, UnknownKey

__all__ = ["Data"]


class Data(Section):
    """``[data]``: the columns that every site must have, and the conversion of rows to tensors.

    A task can have keys of its own (``Task.own_keys``); no job of another task has them.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    text: str = "text"
    image: str = "image"
    audio: str = Field(default="audio", description="column of wav files")
    video: str = Field(default="video", description="column of clips")
    label: str = "label"
    target: str = Field(default="target", description="the text to write, or the number")
    validation: float = Field(default=0.1, ge=0, lt=1, description="share held out of training")
    max_length: int = Field(default=128, ge=4, le=8192, description="tokens of an example")
    masked: float | None = Field(
        default=None, gt=0, lt=1, description="share that is hidden: 0.15 of tokens, 0.6 of patches"
    )
    seconds: float = Field(default=5.0, gt=0, le=60, description="of a recording: cut or padded")
    on_bad_image: Literal["refuse", "skip"] = "refuse"
    on_bad_audio: Literal["refuse", "skip"] = "refuse"
    on_bad_video: Literal["refuse", "skip"] = "refuse"
    normalize: Literal["backbone", "per-image"] = "backbone"
    group: str | None = Field(default=None, description="column that says whose example it is")
    groups: tuple[str, ...] = Field(default=(), description="its values, a fixed list")

    def own_keys(self, defaults: Mapping[str, str | float]) -> dict[str, Any]:
        """Return the keys that only this task has, with its ``defaults`` filled in.

        Raises:
            IllegalJob: a key is not known, or its value has another type than the default.
        """
        given = self.model_extra or {}
        known = [*type(self).model_fields, *defaults]
        for key, value in given.items():
            if key not in defaults:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
                raise UnknownKey(f"unknown key data.{key}", hint)
            named = isinstance(defaults[key], str)
            if not (isinstance(value, str) if named else _is_number(value)):
                what = "the name of a column" if named else "a finite number"
                raise IllegalJob(f"data.{key} = {value!r}: {what} is wanted", f"mend data.{key}")
        return {**defaults, **given}

    def with_own_keys(self, defaults: Mapping[str, str | float]) -> "Data":
        """Return this section with the keys of ``own_keys`` spelled out.

        Raises:
            IllegalJob: as ``own_keys``.
        """
        return self.model_copy(update=self.own_keys(defaults)) if defaults else self

    def column(self, key: str) -> str:
        """Return the name of the column for ``key``: the value of ``key``, or ``key`` itself.

        A key can be a key of every job, or one that only the job's task has.
        """
        known = getattr(self, key) if key in type(self).model_fields else None
        found = (self.model_extra or {}).get(key, known)
        return found if isinstance(found, str) else key

    def skips(self, modality: str) -> bool:
        """Return whether a cell that cannot be decoded is skipped; otherwise it is refused.

        Texts need no decoding.
        """
        return getattr(self, f"on_bad_{modality}", "refuse") == "skip"

    @model_validator(mode="after")
    def _groups_are_listed(self) -> Self:
        if (self.group is None) != (not self.groups):
            raise IllegalJob(
                "group and groups belong together: the column, and the values it may have",
                'data.group = "sex" with data.groups = ["f", "m"], or neither',
            )
        if len(set(self.groups)) != len(self.groups) or "" in self.groups:
            raise IllegalJob("groups has a value twice, or an empty one", "name each group once")
        return self


def _is_number(value: object) -> bool:
    """Return whether ``value`` is a finite number; a whole number may be too large for a float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
