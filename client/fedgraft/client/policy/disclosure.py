"""An estimate of the data that would leave a site in one round of a job, made in advance."""

from dataclasses import asdict, dataclass
from typing import Any

from fedgraft.common.config.job import Job
from fedgraft.common.layout import Layout
from fedgraft.common.messages.codec import encode, wire_bytes
from fedgraft.common.messages.dry_run import blank_replies
from fedgraft.common.privacy import FEWEST

__all__ = ["Disclosure", "estimate_disclosure"]


@dataclass(frozen=True)
class Disclosure:
    """The data that would leave: ``tensors`` by name, with ``parameters`` values in all.

    ``bytes_per_round`` includes evaluation.
    """

    tensors: tuple[str, ...]
    parameters: int
    bytes_per_round: int
    rounds: int
    masked: bool

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON."""
        return asdict(self) | {"tensors": list(self.tensors)}

    def in_words(self) -> str:
        """Return one sentence."""
        how = "masked, so that only sums over sites can be read" if self.masked else "in clear"
        return (
            f"{len(self.tensors)} tensors with {self.parameters:,} values, "
            f"{self.bytes_per_round / 1e6:.2f} MB a round in {self.rounds} rounds, {how}"
        )


def estimate_disclosure(job: Job, exchanged: Layout, sites: int) -> Disclosure:
    """Return the data that one of ``sites`` sites sends in one round of training and evaluation.

    The round trains the tensors of ``exchanged``.
    """
    masking = job.privacy.secure_aggregation
    cohort = min(max(job.rounds.cohort_size(sites), FEWEST), masking.max_sites)
    size = sum(wire_bytes(encode(reply)) for reply in blank_replies(job, exchanged, cohort))
    return Disclosure(exchanged.names, exchanged.size, size, job.rounds.count, masking.enabled)
