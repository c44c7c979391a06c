"""Identities of simulated sites, made once per run, so that secure aggregation runs unchanged."""

from collections.abc import Sequence
from pathlib import Path

from fedgraft.client.membership.identity import make_identity
from fedgraft.common.config.job import Job
from fedgraft.common.federation.federation_file import (
    Federation,
    Floor,
    dump_federation,
    load_federation,
)
from fedgraft.common.files import write_text

__all__ = ["FILE", "found_federation"]

FILE = "federation.toml"


def found_federation(job: Job, folder: Path, sites: Sequence[str]) -> Federation | None:
    """Return the federation of a simulation in ``folder``; make it if it is not there.

    It is None without secure aggregation. Each site's private key is in the site's folder
    ``folder/NAME``. The floor is equal to the job's settings, because a simulated site has no
    officer who asks for more.
    """
    wanted = job.privacy.secure_aggregation
    if not wanted.enabled:
        return None
    path = folder / FILE
    if not path.exists():
        ring = wanted.coding(by_examples=True).ring_bits
        federation = Federation(
            secure_aggregation=Floor(min_ring_bits=ring, max_clip=wanted.clip),
            sites={name: make_identity(folder / name).public.hex() for name in sites},
        )
        write_text(path, dump_federation(federation))
    return load_federation(path)
