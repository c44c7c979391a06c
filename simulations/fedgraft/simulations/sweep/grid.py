"""The grid of a sweep: every combination of the requested settings, with every seed.

A value is the text after ``=`` in the option ``--set`` of simulate, and is put into the job in the
same way. Seeds vary slowest, for two reasons: after the first pass, there is a complete table of
one seed. And cells with the same seed have the same drawn head; they follow each other, so that a
backbone is loaded once for all of them.
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
# Comparisons of the federated model with other models cost more than the federation, and do not
# decide between two settings. A sweep leaves them out unless the user asks for them.
COMPARISONS = {"simulation.baselines": "[]", "simulation.finetune_epochs": "0"}
_CLOSING = {"[": "]", "{": "}"}
_QUOTES = "\"'"


@dataclass(frozen=True)
class Axis:
    """A key of the job and its values, as written; a key with one value is a fixed setting."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One combination with one seed: ``settings`` has the swept keys; ``number`` begins at 1."""

    number: int
    settings: dict[str, str]
    label: str
    job: Job

    @property
    def seed(self) -> int:
        """The seed of the cell's job."""
        return self.job.job.seed


def split_values(text: str) -> tuple[str, ...]:
    """Split at commas that are not inside brackets, braces or quotes; return stripped values.

    Raises:
        InputError: a bracket or quote is not closed, or a value is empty.
    """
    values, start, open_until = [], 0, ""  # missing closing signs, the innermost last
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
    """Return the axes of ``KEY=V1,V2,...`` items in order, then a sweep's default settings.

    Raises:
        InputError: an item has another form, a key is given twice, or a value is empty.
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
    """Return every cell of the grid with its validated job.

    Each combination has ``seeds`` cells (None: 1). Their seeds count up from the job's seed, or an
    axis ``job.seed`` gives them.

    Raises:
        InputError: a cell's job is not valid, two cells are equal, or there are too many cells.
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
    read_text(path)  # a file that cannot be read is no error of a cell
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
    """Return the job with ``settings``; an error names the job's values of ``swept`` keys."""
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
    """Return a short name for each dotted key: the last parts that differ from other keys."""
    names = {}
    for key in keys:
        parts = key.split(".")
        tails = [".".join(parts[at:]) for at in range(len(parts) - 1, -1, -1)]
        others = [f".{other}" for other in keys if other != key]
        clear = (tail for tail in tails if not any(o.endswith(f".{tail}") for o in others))
        names[key] = next(clear, key)
    return names


def as_number(text: str) -> float | None:
    """Return the value of ``text`` in TOML if it is a finite number, otherwise None."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
