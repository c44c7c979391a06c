"""A site's examples for a job: training, validation and test."""

import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fedgraft.client.data.cache import Store
from fedgraft.client.data.files import watched
from fedgraft.client.data.rows import SplitRows, encode, read_split
from fedgraft.client.data.teacher import teacher_logits
from fedgraft.client.site_config import SiteConfig
from fedgraft.common.adapters.model import choose_device, open_processor
from fedgraft.common.backbones.folder import model_files, watched_files
from fedgraft.common.backbones.load import locate
from fedgraft.common.config.job import Job
from fedgraft.common.errors import DataError, SiteFailure
from fedgraft.common.examples import Examples
from fedgraft.common.methods import HeadMethod
from fedgraft.common.witness import Witness

__all__ = ["Splits", "held_out"]

NOTHING = np.empty(0, np.int64)
OVERHEAD = 4096  # bytes of Python objects around the examples of a file


@dataclass(frozen=True)
class Splits:
    """A site's examples; each file is read when it is first needed. Some splits may be empty.

    The examples stay in the memory of ``store`` while that has room and the files stay as they
    were. One ``Splits`` looks at each file once, so what it returns of a file is of one moment.
    """

    config: SiteConfig
    job: Job
    store: Store
    _seen: "dict[str, _Encoded]" = field(default_factory=dict, repr=False, compare=False)

    @property
    def train(self) -> Examples:
        """The examples that the site trains on."""
        return self._of("train")[0]

    @property
    def validation(self) -> Examples:
        """The examples held out of training, or those of a separate validation file."""
        return self._of("train")[1]

    @property
    def test(self) -> Examples:
        """The test examples, which no training sees."""
        return self._of("test")[0]

    def _of(self, file: str) -> "_Encoded":
        if file not in self._seen:
            self._seen[file] = self._kept(file)
        return self._seen[file]

    def _kept(self, file: str) -> "_Encoded":
        # Only these sections decide the examples. A job with another method or number of rounds
        # must not read them again.
        shaping = self.job.model_copy(
            update={
                "method": HeadMethod(kind="head"),
                "job": self.job.job.model_copy(update={"name": "any"}),
            }
        )
        reading = shaping.model_dump_json(include={"job", "backbone", "data", "method"})
        backbone, _ = open_processor(self.job)
        where = f"{file}\n{self.config.data.model_dump_json()}\n{backbone.fingerprint}"
        if self.job.training.distillation is not None:
            where += f"\n{self.config.teacher}"
        key = f"{where}\n{reading}"
        held = self.store.examples.get(key)
        if isinstance(held, _Encoded) and held.seen.holds():
            return held
        seen = Seen()
        # With random weights the fingerprint is of the config alone.
        seen.add(model_files(backbone.folder))
        if self.job.training.distillation is not None and self.config.teacher is not None:
            seen.add(watched_files(locate(self.config.teacher)))
        found = self._read_train(seen) if file == "train" else self._read_test(seen)
        if found.seen.holds():  # otherwise somebody wrote while it was read
            self.store.examples.add(key, found)
        return found

    def _read_train(self, seen: "Seen") -> "_Encoded":
        data = self.config.data
        rows = self._rows(data.train, seen, labelled=data.labelled)
        if data.validation:
            held = self._rows(data.validation, seen)
            return _Encoded((self._taught(rows), self._encoded(held)), seen)
        out = self._held_out(rows) if data.labelled else np.zeros(len(rows.dataset), np.bool_)
        parts = (np.flatnonzero(~out), np.flatnonzero(out))
        return _Encoded((self._taught(rows.only(part)) for part in parts), seen)

    def _held_out(self, rows: SplitRows) -> NDArray[np.bool_]:
        return held_out(rows, self.job.data.validation)

    def _read_test(self, seen: "Seen") -> "_Encoded":
        path = self.config.data.test
        if path is None:
            return _Encoded((self.train.subset(NOTHING),), seen)
        return _Encoded((self._encoded(self._rows(path, seen)),), seen)

    def _taught(self, rows: SplitRows) -> Examples:
        """Return the examples of ``rows``, with the teacher's logits if the job distils."""
        examples = self._encoded(rows)
        if self.job.training.distillation is None:
            return examples
        if self.config.teacher is None:
            raise SiteFailure("no-teacher")
        device = choose_device(self.config.device)
        logits = teacher_logits(
            self.config.teacher, rows.dataset, self.job, store=self.store, device=device
        )
        return examples.with_teacher(logits)

    def _rows(self, path: str, seen: "Seen", *, labelled: bool = True) -> SplitRows:
        data = self.config.data
        seen.watch(path)
        began = time.time()
        rows = read_split(
            path, self.job, columns=data.columns, labels=data.labels, labelled=labelled
        )
        seen.add(rows.files, since=began)  # known by name only now, and checked before
        return rows

    def _encoded(self, rows: SplitRows) -> Examples:
        backbone, processor = open_processor(self.job)
        key = backbone.fingerprint
        return encode(rows.dataset, processor, self.job, store=self.store, key=key)


class Seen:
    """The files that some examples came from, as they were when they were read."""

    def __init__(self) -> None:
        self._paths: dict[str, list[Path]] = {}
        self._witnesses: list[Witness] = []

    def watch(self, path: str) -> None:
        """Add what is at ``path`` of ``site.toml``: a file, a folder or a pattern.

        Raises:
            DataError: nothing is there.
        """
        self._paths[path] = watched(path)
        self.add(self._paths[path])

    def add(self, files: Iterable[Path], *, since: float | None = None) -> None:
        """Add files that something else names, such as a table; ``since`` as for ``Witness``."""
        self._witnesses.append(Witness(files, since=since))

    def holds(self) -> bool:
        """Return whether reading them again would give the same rows."""
        try:
            same = all(watched(path) == found for path, found in self._paths.items())
        except DataError:
            return False
        return same and all(one.holds() for one in self._witnesses)

    @property
    def nbytes(self) -> int:
        """About the size in memory, in bytes."""
        return sum(one.nbytes for one in self._witnesses)


class _Encoded(tuple[Examples, ...]):
    """The examples of one file, or of two that belong together."""

    seen: Seen

    def __new__(cls, parts: Iterable[Examples], seen: Seen) -> Self:
        made = super().__new__(cls, parts)
        made.seen = seen
        return made

    @property
    def nbytes(self) -> int:
        """The size in memory, in bytes."""
        return OVERHEAD + self.seen.nbytes + sum(one.nbytes for one in self)


def held_out(rows: SplitRows, share: float) -> NDArray[np.bool_]:
    """Return the mask, bool [n], of the rows that are held out of training for validation.

    The hash of a row's content is its lot. About ``share`` of the rows, those with the lowest lots,
    are held out. Neither the seed, the job's name, the order nor other rows decide. So a row stays
    on its side while data grow, and in the next job; a larger share holds out all that a smaller
    one does; and equal rows are on one side. The lowest lot is always held out and the highest
    never, so that a site of few rows has both; only there can a row change its side.
    """
    if not share or not len(rows.dataset):
        return np.zeros(len(rows.dataset), np.bool_)
    lots = np.array([_lot(digest) for digest in rows.digests()], np.uint64)
    out: NDArray[np.bool_] = lots < np.uint64(min(int(share * 2**64), 2**64 - 1))
    out |= lots == lots.min()
    out &= lots != lots.max()
    return out


def _lot(digest: bytes) -> int:
    """Return a number below 2**64 that a row draws once and for all."""
    return int.from_bytes(hashlib.sha256(b"fedgraft-validation/1 " + digest).digest()[:8], "big")
