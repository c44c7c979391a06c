"""Prepare a job for a federation: check it, and make its backbone ready for the sites."""

import secrets
import tomllib
from datetime import UTC, datetime
from pathlib import Path

from fedgraft.common.backbones.blob_store import BlobStore, make_manifest
from fedgraft.common.backbones.load import find_backbone
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.errors import InputError
from fedgraft.server.enrollment.registry import Registry
from fedgraft.server.paths import Home

__all__ = ["prepare_job"]


def prepare_job(text: str, home: Home) -> tuple[str, Job]:
    """Return the name of the new run of the job in ``text`` (TOML), and the job for real sites.

    Raises:
        InputError: the job is wrong, or this federation cannot run it.
    """
    job = parse_job(tomllib.loads(text), where="job")
    sites = Registry(home.folder).sites()
    able = [name for name, site in sites.items() if site.state != "revoked"]
    if job.rounds.min_sites > len(able):
        raise InputError(
            f"rounds.min_sites is {job.rounds.min_sites}, and the federation has {len(able)} sites",
            hint="lower it, or provision more sites",
        )
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    # The start adapter is read here; ``Job.for_sites`` removes it from the job that is sent.
    mine = job.model_copy(update={"simulation": None})
    if job.start is not None and not Path(job.start.adapter).is_dir():
        raise InputError(
            f"start.adapter: the coordinator has no folder {job.start.adapter}",
            hint="copy the earlier export there, and name it by its whole path",
        )
    return f"{stamp}-{job.job.name}-{secrets.token_hex(2)}", _with_manifest(mine, home)


def _with_manifest(job: Job, home: Home) -> Job:
    """Return the job with its backbone named by its manifest, and put the backbone in the store.

    A job with a built-in backbone is returned unchanged, because every installation has it. So is a
    job that names a manifest already.
    """
    source = job.backbone.source
    if source.startswith(("builtin:", "manifest:")):
        return job
    backbone = find_backbone(source, weights=job.backbone.weights)
    named = source if source.startswith("hf:") else f"path:{backbone.folder.name}"
    manifest = make_manifest(backbone.folder, source=named)
    BlobStore(home.file("backbones")).import_folder(backbone.folder, manifest)
    renamed = job.backbone.model_copy(update={"source": f"manifest:{manifest.digest}"})
    return job.model_copy(update={"backbone": renamed})
