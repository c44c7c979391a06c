"""The result of a run, kept at the site: the federation's adapter and the facts to judge it.

    state/results/RUN/
        adapter/        PEFT folder, with the site's own head where heads stay at sites
        result.json     the job and the results of its rounds; written last
        report.*        by ``compare``: whether the run was worth it for this site

Nothing here is sent: the coordinator learns only that the result is kept.
"""

import json
import logging
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from fedgraft.client.participant import Participant
from fedgraft.common.adapters.model_card import Origin
from fedgraft.common.adapters.peft_folder import save_adapter
from fedgraft.common.backbones.load import public_source
from fedgraft.common.config.job import Job
from fedgraft.common.errors import AdapterError, InputError, SiteFailure
from fedgraft.common.files import write_text
from fedgraft.common.messages.codec import array_hash
from fedgraft.common.messages.payloads import EvaluateRequest, PastRound, ResultReply, ResultRequest

__all__ = ["Result", "find_result", "keep_result", "list_results"]

log = logging.getLogger("fedgraft.client")

FOLDER, FILE = "results", "result.json"
RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")  # it becomes the name of a folder here


@dataclass(frozen=True)
class Result:
    """A result in ``folder``; ``adapter`` is the SHA-256 of the adapter that the coordinator sent.

    ``backbone`` and ``fingerprint`` name the backbone that the adapter belongs to.
    """

    folder: Path
    run: str
    session: str
    received: str
    job: Job
    names: tuple[str, ...]
    sites: int
    rounds: tuple[PastRound, ...]
    adapter: str
    backbone: str
    fingerprint: str


def keep_result(at: Participant, request: ResultRequest) -> ResultReply:
    """Keep the adapter and the facts of a finished run; a second call changes nothing.

    Raises:
        SiteFailure: ``bad-run``, ``bad-adapter``, ``run-name-taken``, or as ``Participant.open``.
        InputError: the result cannot be written to the disk.
    """
    job, bench = at.open(request.session, request.job, request.round)
    if not RUN.fullmatch(request.run):
        raise SiteFailure("bad-run")
    exchanged = bench.layout.only(request.names)
    try:
        exchanged.check(request.adapter)
    except AdapterError:
        raise SiteFailure("bad-adapter") from None
    if not np.isfinite(request.adapter).all():
        raise SiteFailure("bad-adapter")
    folder, digest = at.state / FOLDER / request.run, array_hash(request.adapter)
    if (folder / FILE).exists():
        known = find_result(at.state, request.run)
        if known.session != request.session:
            raise SiteFailure("run-name-taken")
        if known.adapter == digest:
            return ResultReply(request.session)
    # The vector as a test here would use it: cut to this site's rank, with the site's own head.
    asked = EvaluateRequest(
        request.session, request.round, request.job, request.names, "test", request.adapter
    )
    trained = bench.layout.only((*exchanged.names, *bench.local.names))
    vector = at.start(bench, trained, asked)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    last = request.rounds[-1].round if request.rounds else request.round
    origin = Origin(request.run, now, last, request.sites, own_parts=bool(bench.local.names))
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    save_adapter(bench, job, origin, folder / "adapter", (trained, vector))
    result = Result(
        folder=folder,
        run=request.run,
        session=request.session,
        received=now,
        job=job,
        names=request.names,
        sites=request.sites,
        rounds=request.rounds,
        adapter=digest,
        backbone=public_source(bench.backbone.source),
        fingerprint=bench.backbone.fingerprint,
    )
    write_text(folder / FILE, json.dumps(_to_json(result), indent=1) + "\n")
    log.info("the result of %s is in %s", request.run, folder)
    return ResultReply(request.session)


def find_result(state: Path, run: str) -> Result:
    """Return the result of ``run``.

    Raises:
        InputError: there is none, or its file is damaged.
    """
    folder = state / FOLDER / run
    if not RUN.fullmatch(run) or not (folder / FILE).exists():
        raise InputError(f"no result of {run}", hint="fedgraft site results lists what is here")
    try:
        raw: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
        raw |= {
            "folder": folder,
            "job": Job.model_validate(raw["job"]),
            "names": tuple(raw["names"]),
            "rounds": tuple(_past(line) for line in raw["rounds"]),
        }
        return Result(**raw)
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{folder / FILE} is damaged", hint="restore the folder from a backup"
        ) from None


def list_results(state: Path) -> list[Result]:
    """Return all results, the oldest first."""
    names = [path.parent.name for path in (state / FOLDER).glob(f"*/{FILE}")]
    found = [find_result(state, name) for name in names]
    return sorted(found, key=lambda result: result.received)


def _to_json(result: Result) -> dict[str, Any]:
    raw = {key: value for key, value in vars(result).items() if key != "folder"}
    rounds = [asdict(line) for line in result.rounds]
    for line in rounds:  # JSON has no NaN
        line["accuracy"] = line["accuracy"] if np.isfinite(line["accuracy"]) else None
        line["loss"] = line["loss"] if np.isfinite(line["loss"]) else None
    return raw | {"job": result.job.model_dump(mode="json"), "rounds": rounds}


def _past(line: dict[str, Any]) -> PastRound:
    accuracy, loss = (np.nan if line[k] is None else line[k] for k in ("accuracy", "loss"))
    return PastRound(line["round"], line["sites"], loss, accuracy)
