"""What a person should know of the rows that were read: in counts, never by a cell."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedgraft.client.data.rows import SplitRows

__all__ = ["Findings", "examine"]


@dataclass(frozen=True)
class Findings:
    """Counts of what is unusual in train and test rows.

    ``left_out`` are counts by the reason. ``indices``: labels are numbers, and were read as indices
    into the job's labels. ``twice`` training rows have the content of an earlier one; ``overlap``
    test rows and ``held`` rows of a validation file have the content of a training row.
    """

    left_out: dict[str, int]
    indices: bool
    twice: int
    overlap: int
    held: int = 0

    def notes(self) -> list[str]:
        """Return one sentence for each finding; empty if there is nothing to say."""
        said = [f"Left out, {reason}: {count:,}." for reason, count in self.left_out.items()]
        if self.indices:
            said.append(
                "Labels are read as indices: 0 is the first of job.labels. If the numbers mean "
                "something else, map them in [data.labels] of site.toml."
            )
        if self.twice:
            said.append(
                f"Training rows that repeat an earlier one, and so count twice: {self.twice:,}."
            )
        for what, count in (("Test", self.overlap), ("Validation", self.held)):
            if count:
                said.append(
                    f"{what} rows that stand in the training rows, too: {count:,}. Results on "
                    "them look better than they are: remove them from one of the two."
                )
        return said


def examine(
    train: Sequence[SplitRows], test: Sequence[SplitRows], validation: Sequence[SplitRows] = ()
) -> Findings:
    """Return the findings for the rows of one site, or of several sites together.

    ``validation`` are rows of a file of their own.
    """
    every, left_out = (*train, *test, *validation), Counter[str]()
    for rows in every:
        left_out.update(rows.left_out)
    known = _digests(train)

    def among(parts: Sequence[SplitRows]) -> int:
        return sum(count for digest, count in _digests(parts).items() if digest in known)

    return Findings(
        left_out=dict(+left_out),
        indices=any(rows.labels_read == "indices" for rows in every),
        twice=known.total() - len(known),
        overlap=among(test),
        held=among(validation),
    )


def _digests(parts: Iterable[SplitRows]) -> Counter[bytes]:
    return Counter(digest for rows in parts for digest in rows.digests())
