"""The grid of a sweep: every combination of the settings asked for, with every seed.

A value is what stands after ``=`` in simulate's ``--set`` and goes the same way into the job. Seeds
vary slowest: after the first pass there is a whole table of one seed, and cells that share a seed,
and with it a drawn head, follow each other, so that a backbone is loaded once for all of them.
"""

import itertools
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import load_job
from fedgraft.common.errors import InputError, JobError
from fedgraft.common.toml import read_text

__all__ = ["Axis", "Cell", "as_number", "make_cells", "read_axes", "short_names", "split_values"]

SEED = "job.seed"
MOST_CELLS = 1000
# What compares the federated model with others costs more than the federation and decides nothing
# between two settings of it: a sweep leaves it out unless it is asked for.
COMPARISONS = {"simulation.baselines": "[]", "simulation.finetune_epochs": "0"}
_CLOSING = {"[": "]", "{": "}"}
_QUOTES = "\"'"


@dataclass(frozen=True)
class Axis:
    """A key of the job and the values it takes, as written; one value is a fixed setting."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One combination with one seed: ``settings`` holds the swept keys, ``number`` begins at 1."""

    number: int
    settings: dict[str, str]
    label: str
    job: Job

    @property
    def seed(self) -> int:
        """The seed of its job."""
        return self.job.job.seed


def split_values(text: str) -> tuple[str, ...]:
    """Split at commas that are not inside brackets, braces or quotes; values are stripped.

    Raises:
        InputError: a bracket or quote that is not closed, or an empty value.
    """
    values, start, open_until = [], 0, ""  # closing signs due, the innermost last
    escaped = False
    for at, sign in enumerate(text):
        inside = open_until[-1:]
        if escaped:
            escaped = False
        elif inside and inside in _QUOTES:
            escaped = sign == "\\" and inside == '"'  # a literal string has no escapes
            open_until = open_until[:-1] if sign == inside else open_until
        elif sign in _QUOTES or sign in _CLOSING:
            open_until += _CLOSING.get(sign, sign)
        elif sign == inside:
            open_until = open_until[:-1]
        elif sign in _CLOSING.values():
            raise InputError(f"{text!r}: {sign} closes nothing", hint="put quotes around the value")
        elif sign == "," and not open_until:
            values.append(text[start:at].strip())
            start = at + 1
    values.append(text[start:].strip())
    if open_until:
        raise InputError(
            f"{text!r}: {open_until[-1]} is missing", hint="close it, or quote the whole value"
        )
    if not all(values):
        raise InputError(f"{text!r} has an empty value", hint="KEY=V1,V2 without a comma too many")
    return tuple(values)


def read_axes(items: Iterable[str]) -> tuple[Axis, ...]:
    """The axes of ``KEY=V1,V2,...`` items in their order, then what a sweep sets by itself.

    Raises:
        InputError: an item that is none, a key given twice, an empty value.
    """
    axes: dict[str, Axis] = {}
    for item in items:
        key, equals, text = item.partition("=")
        key = key.strip()
        if not equals:
            raise JobError(
                f"--set {item!r} is not section.key=V1,V2", hint="--set rounds.count=5,10"
            )
        if key in axes:
            raise InputError(f"{key} is given twice", hint=f"--set {key}=V1,V2 has several values")
        try:
            axes[key] = Axis(key, split_values(text))
        except InputError as error:
            raise InputError(f"--set {key}: {error}", hint=error.hint) from None
    added = [Axis(key, (value,)) for key, value in COMPARISONS.items() if key not in axes]
    return (*axes.values(), *added)


def make_cells(path: Path, axes: Sequence[Axis], seeds: int | None) -> tuple[Cell, ...]:
    """Every cell of the grid with its validated job; ``seeds`` of them a combination (None: 1).

    Seeds count up from the job's own; an axis ``job.seed`` names them instead.

    Raises:
        InputError: a cell is no valid job, two cells are the same, or there are too many.
    """
    named = next((axis for axis in axes if axis.key == SEED), None)
    if named is not None and seeds is not None:
        raise InputError(f"both {SEED} and --seeds are given", hint="keep one of them")
    if seeds is not None and seeds < 1:
        raise InputError(f"--seeds {seeds} is no number of seeds", hint="--seeds 3")
    axes = [axis for axis in axes if axis.key != SEED]
    sizes = [len(axis.values) for axis in axes]
    count = math.prod(sizes) * (len(named.values) if named else seeds or 1)
    if count > MOST_CELLS:
        raise InputError(f"{count:,} cells, more than {MOST_CELLS:,}", hint="sweep in parts")
    read_text(path)  # that it cannot be read is not the fault of a cell
    keys = [axis.key for axis in axes]
    combinations = [
        dict(zip(keys, values, strict=True))
        for values in itertools.product(*(axis.values for axis in axes))
    ]
    swept = [axis.key for axis in axes if len(axis.values) > 1]
    if named is None:
        first = _load(path, combinations[0], swept).job.seed
        chosen = tuple(str(first + more) for more in range(seeds or 1))
    else:
        chosen = named.values
    cells: list[Cell] = []
    for seed, settings in itertools.product(chosen, combinations):
        job = _load(path, settings | {SEED: seed}, swept)
        shown = {key: settings[key] for key in swept}
        cells.append(Cell(len(cells) + 1, shown, _label(settings | {SEED: seed}, swept), job))
    _refuse_twins(cells)
    return tuple(cells)


def _load(path: Path, settings: Mapping[str, str], swept: Sequence[str]) -> Job:
    """The job with ``settings``; a problem with it names its values of the ``swept`` keys."""
    try:
        return load_job(path, tuple(f"{key}={value}" for key, value in settings.items()))
    except InputError as error:
        label = _label(settings, swept)
        raise InputError(
            f"cell {label}: {error}" if label else str(error), hint=error.hint
        ) from None


def _label(settings: Mapping[str, str], swept: Sequence[str]) -> str:
    names = short_names(swept) | {SEED: "seed"}
    return " ".join(f"{names[key]}={settings[key]}" for key in (*swept, SEED) if key in settings)


def _refuse_twins(cells: Sequence[Cell]) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        first = seen.setdefault(cell.job.model_dump_json(), cell)
        if first is not cell:
            raise InputError(
                f"cells {first.number} and {cell.number} are the same job: "
                f"{first.label} and {cell.label}",
                hint="give each value of a key once",
            )


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted key by the last of its parts that tell it from the others."""
    names = {}
    for key in keys:
        parts = key.split(".")
        tails = [".".join(parts[at:]) for at in range(len(parts) - 1, -1, -1)]
        others = [f".{other}" for other in keys if other != key]
        clear = (tail for tail in tails if not any(o.endswith(f".{tail}") for o in others))
        names[key] = next(clear, key)
    return names


def as_number(text: str) -> float | None:
    """The finite number that ``text`` is in TOML, None if it is none."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
