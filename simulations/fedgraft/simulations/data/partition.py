"""Split one data set into many sites, each a folder with the same form as a real site's folder.

A simulated site is a ``site.toml`` beside Parquet files. Therefore the code that reads a hospital's
folder also reads these folders. Label skew follows Hsu et al., "Measuring the Effects of
Non-Identical Data Distribution for Federated Visual Classification" (arXiv:1909.06335, 2019), but
class by class: the examples of class c go to the sites in proportions p_c ~ Dirichlet(alpha).
"""

import io
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from fedgraft.client.data.rows import KINDS
from fedgraft.client.site_config import SiteConfig, SiteData, dump_site
from fedgraft.common.config.job import Job
from fedgraft.common.config.simulation import Partition, Simulation
from fedgraft.common.errors import JobError
from fedgraft.common.examples import Indices
from fedgraft.common.modalities.image import open_image, to_channels
from fedgraft.common.section import IllegalJob
from fedgraft.common.seeds import numpy_generator
from fedgraft.simulations.data.shifts import Shift, draw_shifts
from fedgraft.simulations.data.sources import (
    DIGITS,
    TEST_SHARE,
    Pool,
    Share,
    hold_out,
    labels_of,
    load_pool,
    rows_digest,
)
from fedgraft.simulations.demo import digits
from fedgraft.simulations.faults.plan import Fates, wrong_labels

__all__ = ["PreparedSites", "SimulatedSite", "partition", "prepare_sites"]

TRIES = 300


@dataclass(frozen=True)
class SimulatedSite:
    """A site and the content of its folder; ``classes`` counts training examples per label.

    At a site with poisoned labels, ``classes`` counts the wrong labels, which are in its files.
    """

    name: str
    examples: int
    test_examples: int
    classes: tuple[int, ...]
    shift: str


@dataclass(frozen=True)
class PreparedSites:
    """The sites of a simulation, its settings, and the folder with a folder for each site.

    The folder's name is a hash over the rows of the sites. ``skipped`` is the number of files that
    did not decode; they are at no site. ``notes`` are sentences about the rows.
    """

    settings: Simulation
    folder: Path
    sites: tuple[SimulatedSite, ...]
    skipped: int
    notes: tuple[str, ...]


def prepare_sites(job: Job, cache: Path) -> PreparedSites:
    """Write the sites of ``job.simulation`` to a folder below ``cache``, or find them there.

    The folder's name is a hash over the rows and all settings that decide a site's rows. The folder
    is never visible before it is complete.

    Raises:
        JobError: the data cannot be split as the job asks.
        DataError: the data files do not match the job's schema.
    """
    simulation = _simulation(job)
    folder = cache / f"sites-{rows_digest(job, simulation)}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".sites-", dir=cache))
        try:
            _elsewhere(_write_sites, job, simulation, partial)
            _publish(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    index = json.loads((folder / "sites.json").read_text(encoding="utf-8"))
    sites = tuple(
        SimulatedSite(
            name=site["name"],
            examples=site["examples"],
            test_examples=site["test_examples"],
            classes=tuple(site["classes"]),
            shift=site["shift"],
        )
        for site in index["sites"]
    )
    try:
        job.check_sites(len(sites))  # a natural partition is counted only now
    except IllegalJob as error:
        raise JobError(f"rounds: {error}", hint=error.hint) from None
    _check_weights(job, sites)
    notes = tuple(index.get("notes", ()))  # a folder of an earlier version has none
    return PreparedSites(simulation, folder, sites, index["skipped"], notes)


def _check_weights(job: Job, sites: tuple[SimulatedSite, ...]) -> None:
    """Raise JobError now if a site has too many examples, which it would refuse later."""
    masked = job.privacy.secure_aggregation
    largest = max(sites, key=lambda site: site.examples)
    if not masked.enabled or job.aggregation.weights != "examples":
        return
    most, unit = masked.weights(job.measures.most_parts)
    if largest.examples > most * unit:  # of texts the sites count tokens, which are more
        raise JobError(
            f"{largest.name} has {largest.examples:,} training examples, more than "
            f"privacy.secure_aggregation.max_weight = {masked.max_weight:,}",
            hint=f"max_weight = {largest.examples}, or another partition",
        )


def partition(
    labels: Indices,
    test_labels: Indices | None,
    settings: Partition,
    *,
    sites: int,
    generator: np.random.Generator,
) -> list[Share]:
    """Split the rows with ``labels`` [n] (and ``test_labels`` [m]) between ``sites`` sites.

    Each row goes to one site. Test rows have the same proportions as train rows, so that a site's
    test set is similar to its train set. Without ``test_labels``, a stratified fifth of every site
    is held out as test set. Draws are repeated until every site has ``settings.min_examples``
    training examples and, with ``test_labels``, one test example.

    Raises:
        JobError: none of ``TRIES`` draws has enough examples at every site.
    """
    sets = [labels] if test_labels is None else [labels, test_labels]
    least = [settings.min_examples, 1]
    if settings.kind == "iid":  # evenly: all rows are one class, in equal proportions
        sets = [np.zeros_like(each) for each in sets]
    classes = np.unique(np.concatenate(sets))
    rows = [[np.flatnonzero(each == name) for name in classes] for each in sets]
    for _ in range(TRIES):
        proportions = np.full((1, sites), 1 / sites)
        if settings.kind == "dirichlet":
            proportions = generator.dirichlet(np.full(sites, settings.alpha), len(classes))
        borders = [_borders(proportions, mine) for mine in rows]
        sizes = [np.diff(cuts, axis=1).sum(axis=0) for cuts in borders]
        if test_labels is None:
            sizes[0] = sizes[0] - np.rint(sizes[0] * TEST_SHARE)
        if all(size.min() >= low for size, low in zip(sizes, least, strict=False)):
            hands = [_deal(*each, generator) for each in zip(rows, borders, strict=True)]
            if test_labels is None:
                return [hold_out(hand, labels, generator) for hand in hands[0]]
            return [Share(*pair) for pair in zip(*hands, strict=True)]
    told = f"{len(labels)} train" + ("" if test_labels is None else f" and {len(test_labels)} test")
    raise JobError(
        f"{told} rows cannot be dealt to {sites} sites with at least "
        f"{settings.min_examples} train{'' if test_labels is None else ' and 1 test'} each "
        f"({settings.kind}, {TRIES} draws)",
        hint="lower simulation.sites or simulation.partition.min_examples"
        + (", or raise simulation.partition.alpha" if settings.kind == "dirichlet" else ""),
    )


def _borders(proportions: NDArray[np.float64], rows: list[Indices]) -> Indices:
    """Return the borders between the sites' parts of each class: [classes, sites + 1]."""
    counts = np.array([[len(mine)] for mine in rows])
    borders = np.rint(np.cumsum(proportions, axis=1) * counts).astype(np.int64)
    borders[:, -1:] = counts  # a sum of proportions may differ from 1 by a rounding error
    return np.pad(borders, ((0, 0), (1, 0)))


def _deal(rows: list[Indices], borders: Indices, generator: np.random.Generator) -> list[Indices]:
    """Return each site's row numbers, sorted; the rows of a class are drawn at random."""
    shuffled = [generator.permutation(mine) for mine in rows]
    return [
        np.sort(
            np.concatenate([mine[a:b] for mine, a, b in zip(shuffled, starts, ends, strict=True)])
        )
        for starts, ends in zip(borders.T[:-1], borders.T[1:], strict=True)
    ]


def _simulation(job: Job) -> Simulation:
    simulation = job.simulation
    if simulation is None:
        raise JobError("the job has no [simulation]", hint='add it, with train = "data/..."')
    natural = simulation.partition.kind == "natural"
    if not natural and simulation.sites is None:
        raise JobError("simulation.sites is missing", hint="how many sites? sites = 10")
    reads = job.task.modality.name
    if simulation.shift not in ("none", reads):
        raise JobError(
            f'shift = "{simulation.shift}" needs {simulation.shift}s',
            hint='set simulation.shift = "none"',
        )
    if simulation.train == DIGITS and (natural or reads != digits.MODALITY):
        raise JobError(
            f"{DIGITS} are images of one source",
            hint='a task that reads images, and partition.kind "dirichlet" or "iid"',
        )
    return simulation


def _write_sites(job: Job, simulation: Simulation, folder: Path) -> None:
    pool = load_pool(job, simulation)
    shares = pool.natural or _drawn_shares(job, simulation, pool)
    shifts: list[Shift] | list[None] = [None] * len(shares)
    if simulation.shift != "none":
        shifts = draw_shifts(len(shares), numpy_generator(job.job.seed, "simulation", "shifts"))
    index = []
    labels, classes = labels_of(pool.train), job.measures.classes
    # Combine the chunks, one per file: taking rows from thousands of chunks searches all of them.
    train = pool.train.with_format("arrow")[:].combine_chunks()
    test = train if pool.test is None else pool.test.with_format("arrow")[:].combine_chunks()
    poisoned = Fates.draw(job, list(shares)).poisoned if simulation.faults.poisons_labels else ()
    right = labels, train
    wrong = _with_labels(train, wrong_labels(labels, classes)) if poisoned else right
    for (name, share), shift in zip(shares.items(), shifts, strict=True):
        labels, train = wrong if name in poisoned else right
        rows = {"train": (train, share.train), "test": (test, share.test)}
        _write_site(job, rows, shift, folder / name)
        index.append(
            {
                "name": name,
                "examples": len(share.train),
                "test_examples": len(share.test),
                "classes": np.bincount(labels[share.train], minlength=classes).tolist(),
                "shift": shift.describe() if shift else "none",
            }
        )
    facts = {"sites": index, "skipped": pool.skipped, "notes": list(pool.notes)}
    (folder / "sites.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def _with_labels(rows: pa.Table, labels: Indices) -> tuple[Indices, pa.Table]:
    """Return ``labels`` [n], and the rows with these labels instead of their own."""
    at = rows.schema.get_field_index("label")
    return labels, rows.set_column(at, rows.schema.field(at), pa.array(labels))


def _write_site(
    job: Job, rows: Mapping[str, tuple[pa.Table, Indices]], shift: Shift | None, folder: Path
) -> None:
    """Write the site's ``folder`` with its share of each split's rows (as ``read_split`` has)."""
    folder.mkdir()
    generator = numpy_generator(job.job.seed, "simulation", "pixels", folder.name)
    for split, (table, mine) in rows.items():
        if len(mine):
            own = _as_files(job, table.take(mine), shift, generator)
            parquet.write_table(own, folder / f"{split}.parquet")
    data = SiteData(train="train.parquet", test="test.parquet" if len(rows["test"][1]) else None)
    text = dump_site(SiteConfig(name=folder.name, data=data))
    (folder / "site.toml").write_text(text, encoding="utf-8")


def _drawn_shares(job: Job, simulation: Simulation, pool: Pool) -> dict[str, Share]:
    sites = simulation.sites or 1
    shares = partition(
        labels_of(pool.train),
        None if pool.test is None else labels_of(pool.test),
        simulation.partition,
        sites=sites,
        generator=numpy_generator(job.job.seed, "simulation", "partition"),
    )
    width = max(2, len(str(sites - 1)))
    return {f"site-{number:0{width}d}": share for number, share in enumerate(shares)}


def _as_files(
    job: Job, rows: pa.Table, shift: Shift | None, generator: np.random.Generator
) -> pa.Table:
    """Return rows in the form of a real site's file: the job's column names, labels by name."""
    task, name = job.task, job.task.content
    contents = rows[name].to_pylist()
    if task.modality.files:
        contents = [{"bytes": _shifted(one, shift, generator), "path": None} for one in contents]
    kind = datasets.Features({name: KINDS[task.content_kind]}).arrow_schema.field(0).type
    columns: dict[str, pa.Array] = {job.data.column(name): pa.array(contents, kind)}
    stored = {one: rows[one].to_pylist() for one in ("label", *task.stored)}
    written = [
        task.write(dict(zip(stored, values, strict=True)), job.job.labels)
        for values in zip(*stored.values(), strict=True)
    ]
    for key in written[0]:
        columns[job.data.column(key)] = pa.array([row[key] for row in written])
    if job.data.group is not None:
        listed = rows["group"].to_pylist()
        names = [job.data.groups[at] if at >= 0 else None for at in listed]
        columns[job.data.group] = pa.array(names, pa.string())
    return pa.table(columns)


def _shifted(source: dict[str, Any], shift: Shift | None, generator: np.random.Generator) -> bytes:
    """Return the bytes of the image file, unchanged or as PNG after the shift."""
    if shift is None:
        data = source["bytes"]
        return bytes(data) if data is not None else Path(source["path"]).read_bytes()
    image = open_image(source)
    grey = image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")
    buffer = io.BytesIO()
    shift.apply(to_channels(image, 1 if grey else 3), generator).save(buffer, format="PNG")
    return buffer.getvalue()


def _elsewhere(task: Callable[..., None], *arguments: Any) -> None:
    """Run ``task`` in a separate process, because its end frees the memory of all rows.

    If processes cannot be forked, the task runs in this process.
    """
    if sys.platform != "linux":
        task(*arguments)
        return
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        pool.submit(task, *arguments).result()


def _publish(partial: Path, folder: Path) -> None:
    """Rename the finished folder to its final name; another process may have been faster."""
    try:
        os.rename(partial, folder)
    except OSError:
        if not folder.is_dir():
            raise
