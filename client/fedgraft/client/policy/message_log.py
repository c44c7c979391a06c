"""The log of a site's messages, and the copies of the data that it sent.

``state/audit.jsonl`` has a line for every request and every reply. Data that were made from
examples (an update, counts, a masked vector) also stay in ``state/sent/RUN/ROUND`` for the newest
rounds, in files that ``numpy.load`` opens. Lines have names, shapes, sizes, hashes and norms, never
values. Of an exception, they have only its code.
"""

import hashlib
import io
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedgraft.client.membership.state_files import AUDIT
from fedgraft.common.federation.audit_log import Audit
from fedgraft.common.files import write_atomically
from fedgraft.common.layout import Layout
from fedgraft.common.messages.codec import RecordDict, arrays_in, parts
from fedgraft.common.messages.payloads import Refusal, Reply, Request, TrainReply
from fedgraft.common.secagg.statements import MaskedInput

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["MessageLog", "Occasion"]


@dataclass(frozen=True)
class Occasion:
    """The occasion of a message.

    ``run`` is the session, ``round`` is 0 outside rounds, ``policy`` is the policy's hash.
    """

    run: str
    round: int
    stage: str
    policy: str


class MessageLog:
    """The records of one site; sent data are kept for ``keep`` rounds."""

    def __init__(self, state: Path, *, keep: int) -> None:
        self.audit = Audit(state / AUDIT)
        self.sent_folder = state / "sent"
        self._keep = keep

    def received(self, occasion: Occasion, request: Request, content: RecordDict) -> None:
        """Record a request before it is handled.

        Raises:
            AuditError: the request cannot be recorded.
        """
        self._write(occasion, "in", "received", content, _tensors(request))

    def sent(
        self, occasion: Occasion, reply: Reply, content: RecordDict, layout: Layout | None = None
    ) -> None:
        """Keep and record a reply before it leaves; ``layout`` is that of an update in clear.

        A site does not clip an update in clear, so its norms before and after are equal. The site
        adds no noise, so no epsilon is recorded.

        Raises:
            AuditError: the reply cannot be recorded.
            OSError: the reply cannot be kept.
        """
        if isinstance(reply, Refusal):
            self._write(occasion, "out", "refused", content, [], code=reply.code)
            return
        tensors = _tensors(reply)
        if isinstance(reply, TrainReply) and layout is not None:
            tensors = list(_by_name(reply.update, layout))
        if tensors and self._keep:
            self._store(occasion, reply, content)
        norm = float(np.linalg.norm(reply.update)) if isinstance(reply, TrainReply) else None
        facts = {"norm_before": norm, "norm_after": norm, "epsilon": None}
        self._write(occasion, "out", "sent", content, tensors, **facts)

    def decided(self, occasion: Occasion, decision: str) -> None:
        """Record a person's decision about a job.

        Raises:
            AuditError: the decision cannot be recorded.
        """
        self.audit.append(asdict(occasion) | {"direction": "", "decision": decision})

    def _write(
        self,
        occasion: Occasion,
        direction: str,
        decision: str,
        content: RecordDict,
        tensors: list[dict[str, Any]],
        **more: Any,
    ) -> None:
        size, digest = 0, hashlib.sha256()
        for _, part in parts(content):
            size += len(part)
            digest.update(part)
        facts = {"direction": direction, "decision": decision, "code": "", "bytes": size}
        facts |= {"sha256": digest.hexdigest(), **more, "tensors": tensors}
        self.audit.append(asdict(occasion) | facts)

    def _store(self, occasion: Occasion, reply: Reply, content: RecordDict) -> None:
        """Keep the content that leaves, and delete that of older rounds, of all runs.

        Small arrays leave inside the payload's record; a separate copy of each is kept as well.
        """
        folder = self.sent_folder / occasion.run / f"{occasion.round:06d}"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = list(parts(content))
        digest = hashlib.sha256(b"".join(part for _, part in found)).hexdigest()
        there = {name for name, _ in found}
        for name, array in arrays_in(reply):
            if f"{name}.npy" not in there:
                file = io.BytesIO()
                np.save(file, array, allow_pickle=False)
                found.append((f"{name}.npy", file.getvalue()))
        path = folder / f"{occasion.stage}-{digest[:16]}.npz"
        write_atomically(path, lambda temporary: _zip(temporary, found))
        rounds = sorted(self.sent_folder.glob("*/*"), key=lambda each: each.stat().st_mtime_ns)
        for old in rounds[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)
            if not any(old.parent.iterdir()):
                old.parent.rmdir()


def _zip(path: Path, found: list[tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in found:
            archive.writestr(name, part)


def _tensors(payload: "DataclassInstance") -> list[dict[str, Any]]:
    """Return one entry for each array; a masked vector is one entry, whatever it is made of."""
    masked = isinstance(payload, MaskedInput)
    return [_entry("masked" if masked else name, array) for name, array in arrays_in(payload)]


def _by_name(update: NDArray[Any], layout: Layout) -> Iterator[dict[str, Any]]:
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        yield _entry(name, update[layout.slices[name]].reshape(shape))


def _entry(name: str, array: NDArray[Any]) -> dict[str, Any]:
    content = np.ascontiguousarray(array)
    return {
        "name": name,
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "bytes": content.nbytes,
        "sha256": hashlib.sha256(content.data).hexdigest(),
    }
