"""Every error that fedgraft raises on purpose, with the user's next step.

FedgraftError            exit 1   base: ``str(error)`` is the problem, ``.hint`` the next step
|-- InputError           exit 2   an input that a person wrote or named is wrong
|   |-- JobError                  the job file or a --set override
|   |-- DataError                 a data file: missing, empty, wrong column, label, encoding
|   |-- BackboneError             the frozen model: missing, unsafe format, wrong kind
|   `-- AdapterError              the adapter: targets that match nothing, layouts that differ
|-- RoundAborted         exit 1   a round has no result; another attempt may succeed
|   `-- TooFewSites      exit 4   fewer sites answered than the job allows
|-- RunError             exit 1   a run folder that cannot be used
|   `-- CheckpointError           no checkpoint of the run can be trusted
|-- AuditError           exit 1   an audit cannot be written, or its chain is broken
|-- TransferError        exit 1   a backbone could not be fetched, or not stored completely
|-- MessageError         exit 1   a message that does not follow the protocol
`-- SiteFailure          exit 1   a site could not do its part; only ``.code`` ever leaves the site
"""

__all__ = [
    "AdapterError",
    "AuditError",
    "BackboneError",
    "CheckpointError",
    "DataError",
    "FedgraftError",
    "InputError",
    "JobError",
    "MessageError",
    "RoundAborted",
    "RunError",
    "SiteFailure",
    "TooFewSites",
    "TransferError",
    "first_line",
]


class FedgraftError(Exception):
    """The base of the tree; ``hint`` is the next step in one line, without a full stop."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class InputError(FedgraftError):
    """An input that a person wrote or named is wrong."""

    exit_code = 2


class JobError(InputError):
    """The job file or an override of it is wrong."""


class DataError(InputError):
    """A data file is missing, empty or does not match the job's schema."""


class BackboneError(InputError):
    """The frozen model is missing, unsafe or of the wrong kind."""


class AdapterError(InputError):
    """The adapter cannot be attached, or its layout is not the expected one."""


class RoundAborted(FedgraftError):
    """A round has no result.

    No update was applied and, under secure aggregation, none was opened.
    """


class TooFewSites(RoundAborted):
    """Fewer sites answered than the job's ``min_sites`` or secure aggregation allow."""

    exit_code = 4


class RunError(FedgraftError):
    """A run folder cannot be used."""


class CheckpointError(RunError):
    """No checkpoint of the run can be trusted."""


class AuditError(FedgraftError):
    """An audit cannot be written, or somebody changed it."""


class TransferError(FedgraftError):
    """A backbone could not be fetched or not stored completely; the received part is kept."""


class MessageError(FedgraftError):
    """A message does not follow the protocol."""


class SiteFailure(FedgraftError):
    """A site could not do its part; only ``code`` may leave the site."""

    def __init__(self, code: str, message: str = "") -> None:
        super().__init__(message or code)
        self.code = code


def first_line(error: Exception) -> str:
    """Return the first line of a foreign error's text, at most 200 characters.

    If there is no text, it is the name of the error's class.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
