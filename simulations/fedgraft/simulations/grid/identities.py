"""Identities of simulated sites, made once a run: secure aggregation runs its real code."""

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
    """The federation of a simulation, in ``folder``, made if it is not there yet.

    Each site's private key lies in its own folder ``folder/NAME``. The floor is what the job asks
    for: a simulated site has no officer who insists on more. None without secure aggregation.
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
