"""The errors of secure aggregation; no error message contains a key, a share or a value.

SecAggError             base: ``hint`` is the next step, ``culprits`` the sites to blame, if known
|-- ParameterError      numbers that cannot work together, or a possible overflow
|-- PolicyRefused       the coordinator asks for less than the federation's signed floor
|-- StageError          a message out of order, repeated, or for a round that is over
|-- StatementError      another party's message is malformed, unsigned, replayed or inconsistent
|-- TooFewParties       below a threshold; nothing was unmasked, the next round may work
|-- InputRefused        a site's own update, weight or metric is out of range
`-- UnmaskError         the sum could not be opened or fails its checks; there is no output
"""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "InputRefused",
    "ParameterError",
    "PolicyRefused",
    "SecAggError",
    "StageError",
    "StatementError",
    "TooFewParties",
    "UnmaskError",
    "blame",
]


class SecAggError(Exception):
    """The base of the tree; ``culprits`` are ids in the roster, sorted."""

    hint = "start the next round; if it fails again, stop the job"

    def __init__(self, message: str, *, culprits: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.culprits = culprits


class ParameterError(SecAggError):
    """The parameters cannot work, regardless of the parties' behaviour."""

    hint = "change the job's secure aggregation settings"


class PolicyRefused(SecAggError):
    """The parameters are below the federation's policy, or are not the agreed parameters."""

    hint = "compare the coordinator's job with the policy in the site's kit"


class StageError(SecAggError):
    """A message came out of order; a party does each stage of a round only once."""


class StatementError(SecAggError):
    """A message of another party does not follow the protocol."""

    hint = "leave the named site out and start the next round"


class TooFewParties(SecAggError):
    """There are fewer parties than a threshold; nothing about any party's update was revealed."""

    hint = "start the next round when more sites are connected"


class InputRefused(SecAggError):
    """This site's own contribution cannot be encoded: it is not finite, or is out of range."""

    hint = "check the training loss, or raise the weight or metric limits of the job"


class UnmaskError(SecAggError):
    """The sum cannot be opened, or fails its check lanes; it was discarded."""

    hint = "leave the named sites out, if any, and start the next round"


@contextmanager
def blame(site: int) -> Iterator[None]:
    """Name ``site`` as the culprit of a ``StatementError`` that is raised inside."""
    try:
        yield
    except StatementError as error:
        raise StatementError(f"site {site}: {error}", culprits=(site,)) from None
