"""The submitted jobs, kept in small files, so that a restarted coordinator goes on with them.

``jobs/NAME.json`` holds the state of one job: ``waiting``, ``running``, ``finished``, ``failed`` or
``stopped``, and the reason. Its run is the folder ``runs/NAME``. The progress is not kept here: it
is the number of rounds that are committed in that folder.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import dump_job
from fedgraft.common.errors import InputError
from fedgraft.common.files import write_text

__all__ = ["OPEN", "Jobs", "Submitted"]

OPEN = ("waiting", "running")


@dataclass(frozen=True)
class Submitted:
    """One job: ``name`` is also the name of its run folder; ``tries`` counts its starts."""

    name: str
    state: str = "waiting"
    why: str = ""
    tries: int = 0


class Jobs:
    """The submitted jobs in ``folder``, in the order of their submission."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True, mode=0o700)

    def submit(self, name: str, job: Job) -> Submitted:
        """Add a job; it is durable when this returns."""
        write_text(self.folder / f"{name}.toml", dump_job(job))
        return self.put(Submitted(name))

    def put(self, one: Submitted) -> Submitted:
        """Write the state of a job to its file, and return the job."""
        write_text(self.folder / f"{one.name}.json", json.dumps(asdict(one)))
        return one

    def set(self, name: str, state: str, why: str = "") -> Submitted:
        """Change a job's state, and return the job.

        Raises:
            InputError: there is no such job.
        """
        found = next((one for one in self.all() if one.name == name), None)
        if found is None:
            raise InputError(f"no run {name}", hint="`fedgraft coordinator status` lists them")
        tries = found.tries + (state == "running")
        return self.put(replace(found, state=state, why=why, tries=tries))

    def text(self, name: str) -> str:
        """Return the text of a submitted job's file (TOML)."""
        return (self.folder / f"{name}.toml").read_text(encoding="utf-8")

    def all(self) -> list[Submitted]:
        """Return every job, oldest first; names begin with the time of submission."""
        paths = sorted(self.folder.glob("*.json"))
        return [Submitted(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]

    def next(self, after: str = "") -> Submitted | None:
        """Return the job to run now: the oldest open job after ``after``.

        The job ``after`` lacks sites, so later jobs come first. If there is no later open job, it
        is the oldest open job of all; None if no job is open.
        """
        found = [one for one in self.all() if one.state in OPEN]
        return next((one for one in found if one.name > after), found[0] if found else None)
