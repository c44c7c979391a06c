"""A site's examples for a job: training, validation and test."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedgraft.client.data.cache import Store
from fedgraft.client.data.rows import SplitRows, encode, read_split
from fedgraft.client.data.teacher import teacher_logits
from fedgraft.client.site_config import SiteConfig
from fedgraft.common.adapters.model import choose_device, open_processor
from fedgraft.common.config.job import Job
from fedgraft.common.errors import SiteFailure
from fedgraft.common.examples import Examples, Indices
from fedgraft.common.methods import HeadMethod
from fedgraft.common.seeds import numpy_generator

__all__ = ["Splits", "split_validation"]

NOTHING = np.empty(0, np.int64)
OVERHEAD = 4096  # bytes of Python objects around the examples of a file


@dataclass(frozen=True)
class Splits:
    """A site's examples; each file is read when it is first needed. Some splits may be empty.

    The examples stay in the memory of ``store`` while that has room.
    """

    config: SiteConfig
    job: Job
    store: Store

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
        # Only these sections decide the examples. A job with another method or number of rounds
        # must not read them again.
        shaping = self.job.model_copy(update={"method": HeadMethod(kind="head")})
        reading = shaping.model_dump_json(include={"job", "backbone", "data", "method"})
        where = f"{file}\n{self.config.name}\n{self.config.data.model_dump_json()}"
        if self.job.training.distillation is not None:
            where += f"\n{self.config.teacher}"
        found = self.store.examples.get(f"{where}\n{reading}")
        if found is None:
            found = self._read_train() if file == "train" else self._read_test()
            self.store.examples.add(f"{where}\n{reading}", found)
        assert isinstance(found, _Encoded)  # noqa: S101  # nothing else is held there
        return found

    def _read_train(self) -> "_Encoded":
        train, own = self._with_teacher(self.config.data.train), self.config.data.validation
        if own:
            return _Encoded((train, self._encoded(own)))
        if not self.config.data.labelled:
            return _Encoded((train, train.subset(NOTHING)))
        draw = numpy_generator(self.job.job.seed, "validation", self.config.name)
        parts = split_validation(train.labels, self.job.data.validation, draw)
        return _Encoded(train.subset(part) for part in parts)

    def _read_test(self) -> "_Encoded":
        if self.config.data.test is None:
            return _Encoded((self.train.subset(NOTHING),))
        return _Encoded((self._encoded(self.config.data.test),))

    def _encoded(self, path: str) -> Examples:
        return self._encoded_rows(self._rows(path))

    def _with_teacher(self, path: str) -> Examples:
        """Return the examples of ``path``, with the teacher's logits if the job distils."""
        rows = self._rows(path, labelled=self.config.data.labelled)
        examples = self._encoded_rows(rows)
        if self.job.training.distillation is None:
            return examples
        if self.config.teacher is None:
            raise SiteFailure("no-teacher")
        device = choose_device(self.config.device)
        logits = teacher_logits(
            self.config.teacher, rows.dataset, self.job, store=self.store, device=device
        )
        return examples.with_teacher(logits)

    def _rows(self, path: str, *, labelled: bool = True) -> SplitRows:
        data = self.config.data
        return read_split(
            path, self.job, columns=data.columns, labels=data.labels, labelled=labelled
        )

    def _encoded_rows(self, rows: SplitRows) -> Examples:
        backbone, processor = open_processor(self.job)
        key = backbone.fingerprint
        return encode(rows.dataset, processor, self.job, store=self.store, key=key)


class _Encoded(tuple[Examples, ...]):
    """The examples of one file."""

    @property
    def nbytes(self) -> int:
        """The size in memory, in bytes."""
        return OVERHEAD + sum(one.nbytes for one in self)


def split_validation(
    labels: NDArray[np.int64], share: float, generator: np.random.Generator
) -> tuple[Indices, Indices]:
    """Split the indices of ``labels`` [n] into (train, validation), each sorted, int64.

    Validation has about ``share`` of all examples and of every class (largest remainders, ties in
    random order). But every class keeps at least one training example, so validation may be empty
    for a tiny set.
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
