"""The sources of a simulation's rows: read them, hash them, and name sites that the data has.

The rows, and not paths or dates, decide whether site folders can be used again. The hash is over
every text and every image file, which is read without decoding it.
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from fedgraft.client.data.files import read_tables
from fedgraft.client.data.findings import examine
from fedgraft.client.data.groups import read_groups
from fedgraft.client.data.rows import SplitRows, read_split
from fedgraft.common.config.job import Job
from fedgraft.common.config.simulation import Simulation
from fedgraft.common.errors import JobError
from fedgraft.common.examples import Indices
from fedgraft.common.seeds import numpy_generator
from fedgraft.common.tasks import Task
from fedgraft.simulations.demo import digits

__all__ = [
    "DIGITS",
    "TEST_SHARE",
    "Pool",
    "Share",
    "hold_out",
    "labels_of",
    "load_pool",
    "rows_digest",
]

FORMAT = 2
"""Part of every digest; raise it if the same rows would now give other sites or shifts."""

DIGITS = "builtin:digits"
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Share:
    """The rows of one site: int64 indices into the train rows and into the test rows.

    If the data set has no test rows, ``test`` holds indices into the train rows that are held out
    of ``train``.
    """

    train: Indices
    test: Indices


@dataclass(frozen=True)
class Pool:
    """All rows, as ``read_split`` returns them, and the ``natural`` shares if the data has sites.

    ``skipped`` is the number of files that did not decode and were left out, as the job allows.
    ``notes`` are sentences about the rows that a person should know.
    """

    train: datasets.Dataset
    test: datasets.Dataset | None
    natural: Mapping[str, Share] | None = None
    skipped: int = 0
    notes: tuple[str, ...] = ()


def load_pool(job: Job, simulation: Simulation) -> Pool:
    """Read and return the rows of ``simulation``.

    Raises:
        JobError: a pattern gives no site names, a site has too few rows, or the job does not fit
            the built-in digits.
        DataError: the data files do not match the job's schema.
    """
    if simulation.partition.kind == "natural":
        return _load_natural(job, simulation)
    if simulation.train == DIGITS:
        train, test = (_as_split(rows, job) for rows in digits.load())
        own = simulation.test in (None, DIGITS)
        return Pool(train, test if own else read_split(str(simulation.test), job).dataset)
    read = [read_split(path, job) for path in (simulation.train, simulation.test) if path]
    rest = read[1].dataset if simulation.test else None
    return Pool(read[0].dataset, rest, None, *_found(read[:1], read[1:]))


def _found(train: Sequence[SplitRows], test: Sequence[SplitRows]) -> tuple[int, tuple[str, ...]]:
    """Return the number of files that were skipped, and the notes about all rows."""
    skipped = sum(rows.skipped for rows in (*train, *test))
    return skipped, tuple(examine(train, test).notes())


def _as_split(rows: datasets.Dataset, job: Job) -> datasets.Dataset:
    """Return the digits as ``read_split`` would return them, with the job's labels, by name."""
    if job.data.groups:
        raise JobError(f"{DIGITS} has no groups", hint="leave data.group and data.groups out")
    if job.task.stored:
        raise JobError(
            f"{DIGITS} have nothing but a label beside each image",
            hint=f"data of your own for {job.job.task}: simulation.train = ...",
        )
    if not job.task.labelled:
        return rows.remove_columns("label").add_column("label", [0] * len(rows))
    names = rows.features["label"].names
    unknown = [name for name in names if name not in job.job.labels]
    if unknown:
        raise JobError(
            f"{DIGITS} has label {unknown[0]!r}, the job has not",
            hint='labels = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]',
        )
    labels = [job.job.labels.index(names[value]) for value in rows[:]["label"]]
    return rows.remove_columns("label").add_column("label", labels)


def _load_natural(job: Job, simulation: Simulation) -> Pool:
    trains, tests = _natural_sources(simulation)
    read = [read_split(path, job) for path in (*trains.values(), *tests.values())]
    train = [rows.dataset for rows in read[: len(trains)]]
    test = [rows.dataset for rows in read[len(trains) :]]
    whole = datasets.concatenate_datasets(train)
    if test:
        pairs = zip(_ranges(train), _ranges(test), strict=True)
        shares = {name: Share(*pair) for name, pair in zip(trains, pairs, strict=True)}
    else:
        labels, seed = labels_of(whole), job.job.seed
        shares = {
            name: hold_out(rows, labels, numpy_generator(seed, "simulation", "test", name))
            for name, rows in zip(trains, _ranges(train), strict=True)
        }
    for name, share in shares.items():
        if len(share.train) < simulation.partition.min_examples:
            raise JobError(
                f"{trains[name]} leaves site {name} {len(share.train)} examples to train on",
                hint="lower simulation.partition.min_examples, or take it out of the pattern",
            )
    found = _found(read[: len(trains)], read[len(trains) :])
    return Pool(whole, datasets.concatenate_datasets(test) if test else None, shares, *found)


def _natural_sources(simulation: Simulation) -> tuple[dict[str, str], dict[str, str]]:
    """Return train and test sources by site name, in the same order.

    There are no test sources if ``simulation.test`` is None.
    """
    trains = _named_matches(simulation.train, "simulation.train")
    if simulation.sites is not None and simulation.sites != len(trains):
        raise JobError(
            f"{simulation.train} matches {len(trains)} sites, simulation.sites says "
            f"{simulation.sites}",
            hint="leave simulation.sites out: a natural partition counts them",
        )
    if simulation.test is None:
        return trains, {}
    tests = _named_matches(simulation.test, "simulation.test")
    if lonely := sorted(trains.keys() - tests.keys()):
        raise JobError(
            f"no test data for site {lonely[0]} matches {simulation.test}",
            hint=f"test sets were found for: {', '.join(list(tests)[:10])}",
        )
    return trains, {name: tests[name] for name in trains}


def _named_matches(pattern: str, key: str) -> dict[str, str]:
    """Return every match of a glob by its name: the text in the place of the wildcards."""
    if not glob.has_magic(pattern) or "**" in pattern:
        raise JobError(
            f"{key} = {pattern!r} does not say where the sites' names are",
            hint='a natural partition needs one * per name, as in "data/*/train.jsonl"',
        )
    # An escaped pattern has \* and \? for the wildcards; other wildcards give no part of the name.
    regex = re.escape(pattern).replace(r"\*", "([^/]*)").replace(r"\?", "([^/])")
    named: dict[str, str] = {}
    for match in sorted(glob.glob(pattern)):
        found = re.fullmatch(regex, match)
        raw = "-".join(found.groups()) if found else Path(match).stem
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", raw).strip("-._")[:64]
        if not name or name in named:
            raise JobError(
                f"{match} has no site name of its own ({name!r})",
                hint="rename its folder, or put the * where the names differ",
            )
        named[name] = match
    if not named:
        raise JobError(f"{key}: nothing matches {pattern}", hint="check the pattern")
    return named


def _ranges(parts: list[datasets.Dataset]) -> Iterator[Indices]:
    """Yield the row numbers of each part in the concatenation of all parts."""
    start = 0
    for part in parts:
        yield np.arange(start, start + len(part), dtype=np.int64)
        start += len(part)


def hold_out(rows: Indices, labels: Indices, generator: np.random.Generator) -> Share:
    """Split ``rows`` (indices into ``labels``) into train rows and a stratified fifth as test."""
    train, test = stratified_split(labels[rows], TEST_SHARE, generator)
    return Share(rows[train], rows[test])


def stratified_split(
    labels: Indices, share: float, generator: np.random.Generator
) -> tuple[Indices, Indices]:
    """Split the indices of ``labels`` [n] into (train, held out), each sorted, int64.

    The second part has about ``share`` of all examples and of every class (largest remainders,
    ties in random order). But every class keeps at least one training example, so the second part
    may be empty for a tiny set.
    """
    classes, of_class = np.unique(labels, return_inverse=True)
    counts = np.bincount(of_class, minlength=len(classes))
    wanted = counts * share
    taken = np.minimum(np.floor(wanted).astype(np.int64), np.maximum(counts - 1, 0))
    missing = round(len(labels) * share) - int(taken.sum())
    lot = generator.permutation(len(classes))
    by_remainder = lot[np.argsort(-(wanted - np.floor(wanted))[lot], kind="stable")]
    able = [c for c in by_remainder if taken[c] < counts[c] - 1 and wanted[c] > taken[c]]
    taken[able[: max(0, missing)]] += 1
    chosen = [
        generator.permutation(np.flatnonzero(of_class == c))[: taken[c]]
        for c in range(len(classes))
    ]
    validation = np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *chosen])).astype(np.int64)
    train = np.setdiff1d(np.arange(len(labels), dtype=np.int64), validation)
    return train, validation


def labels_of(rows: datasets.Dataset) -> Indices:
    """Return the label column of ``rows``, int64 [n]."""
    return np.asarray(rows.with_format("numpy")["label"][:], dtype=np.int64)


def rows_digest(job: Job, simulation: Simulation) -> str:
    """Return a hash over the rows, as they are in the files, and the settings of the sites."""
    task = job.task
    settings = json.dumps(_settings(job, simulation), sort_keys=True)
    digest = hashlib.sha256(settings.encode())
    natural = simulation.partition.kind == "natural"
    beside = job.data.column(task.beside) if task.beside else None
    for pattern in (simulation.train, simulation.test):
        # The digits are files of this program: their name and FORMAT identify them.
        sources = {"": pattern} if pattern else {}
        if natural and pattern:
            sources = _named_matches(pattern, "simulation")
        for name, path in sources.items():
            _feed(digest, "source", name)
            if path == DIGITS:
                _feed(digest, DIGITS)
                continue
            content, files = job.data.column(task.content), task.modality.files
            known = job.job.labels
            for table in read_tables(
                path, content=content, label=beside, images=files, labels=known
            ):
                _feed(digest, "table", str(table.typed))
                if table.left_out:  # it is told beside the rows
                    _feed(digest, "left out", repr(sorted(table.left_out.items())))
                for one, label in zip(table.contents, table.labels, strict=True):
                    _feed(digest, _content_bytes(one), repr(label))
            if job.data.groups:
                _feed(digest, "groups", read_groups(path, job.data, {}).tobytes())
        _feed(digest, "end")
    return digest.hexdigest()[:32]


def _settings(job: Job, simulation: Simulation) -> dict[str, Any]:
    """Return the settings that decide the rows of a site; settings not in use are absent."""
    settings: dict[str, Any] = {
        "format": FORMAT,
        "seed": job.job.seed,
        "task": job.job.task,
        "labels": job.job.labels,
        "data": job.data.model_dump(include=_deciding(job.task)),
        "simulation": simulation.model_dump(include={"sites", "partition", "shift"}),
    }
    if job.task.own_keys:
        settings["keys"] = job.settings.keys
    if job.data.groups:
        settings["groups"] = (job.data.group, job.data.groups)
    if simulation.faults.poisons_labels:  # otherwise absent, so that older digests stay valid
        settings["poisoned"] = simulation.faults.poisoned
    return settings


def _deciding(task: Task) -> set[str]:
    """Return the settings of ``[data]`` that decide the rows; some tasks have additional ones."""
    name = task.modality.name
    own = {name, f"on_bad_{name}", *([task.beside] if task.beside else [])}
    return {"text", "image", "label", "on_bad_image"} | own


def _feed(digest: Any, *parts: str | bytes) -> None:
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode(errors="backslashreplace")
        digest.update(len(data).to_bytes(8, "big") + data)


def _content_bytes(content: Any) -> str | bytes:
    """Return the content of a text or an image to hash; ``read_split`` refuses a missing image."""
    if not isinstance(content, dict):
        return repr(content)
    if content["bytes"] is not None:
        return bytes(content["bytes"])
    path = Path(content["path"])
    return path.read_bytes() if os.path.isfile(path) else "missing"  # a cell may be no path at all
