"""Fetch a job's backbone once from the coordinator, before the job is opened."""

import logging
import time
from contextlib import suppress
from pathlib import Path

from fedgraft.client.membership.backbone_client import fetch_backbone
from fedgraft.client.membership.credentials import load_membership, open_member_channel
from fedgraft.common.backbones.blob_store import open_store
from fedgraft.common.config.job import Job
from fedgraft.common.errors import BackboneError

__all__ = ["ensure_backbone"]

log = logging.getLogger("fedgraft.client")

KIND = "manifest:"
EVERY = 5.0  # seconds between two lines of progress


def ensure_backbone(job: Job, state: Path) -> None:
    """Fetch the job's backbone, if it names one by its manifest and it is not here yet.

    Raises:
        FedgraftError: it cannot be fetched; received chunks are kept.
    """
    source = job.backbone.source
    if not source.startswith(KIND):
        return
    store, digest = open_store(), source.removeprefix(KIND)
    with suppress(BackboneError):  # the backbone is not here
        if store.complete(store.manifest(digest)):
            return
    member = load_membership(state)
    with open_member_channel(state, member.endpoint) as channel:
        fetch_backbone(channel, digest, store, progress=_Progress())


class _Progress:
    """Logs a line every few seconds, with the rate and the time left."""

    def __init__(self) -> None:
        self._began = self._said = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = done
        if now - self._said < EVERY and done < total:
            return
        self._said = now
        rate = (done - self._first) / max(now - self._began, 1e-6)
        left = f", {(total - done) / rate:,.0f} s left" if rate and done < total else ""
        size = f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
        log.info("backbone: %s at %.0f MB/s%s", size, rate / 1e6, left)
