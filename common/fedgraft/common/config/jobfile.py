"""Read a job from TOML, apply ``--set`` overrides, and explain every error."""

import difflib
import os
import re
import tomllib
import types
import typing
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError

from fedgraft.common.config.job import Job
from fedgraft.common.errors import JobError
from fedgraft.common.methods import METHODS
from fedgraft.common.section import UnknownKey
from fedgraft.common.toml import read_text

__all__ = ["dump_job", "load_job", "parse_job"]

PATH_KEYS = ("train", "test")


def load_job(path: Path, overrides: tuple[str, ...] = ()) -> Job:
    """Load and validate the job file at ``path``.

    ``overrides`` are ``"section.key=value"`` strings whose values are TOML; a bare word is read as
    a string. A relative path in the file is relative to the file; in an override it is relative to
    the working directory. ``${NAME}`` in a path is replaced by the environment variable.

    Raises:
        JobError: the file is missing, is not UTF-8 TOML, or does not describe a valid job.
    """
    try:
        raw = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise JobError(f"{path} is not valid TOML: {error}", hint="mend that line") from None
    _anchor_paths(raw, path.parent.resolve())
    overriding: dict[str, Any] = {}
    for item in overrides:
        _override(overriding, item)
    _anchor_paths(overriding, Path.cwd())
    _one_source_of_labels(raw, overriding)
    _one_kind_of_method(raw, overriding)
    _merge(raw, overriding)
    _read_labels(raw)
    return parse_job(raw, where=str(path))


def parse_job(raw: dict[str, Any], *, where: str) -> Job:
    """Validate ``raw`` as a job; ``where`` is the name of its source in errors.

    Raises:
        JobError: with every problem found, and the nearest known key for a misspelt key.
    """
    try:
        return Job.model_validate(raw)
    except ValidationError as error:
        problems = [_explain(dict(item)) for item in error.errors()]
    lines = dict.fromkeys(f"{where}: {what}" for what, _ in problems)
    hints = list(dict.fromkeys(hint for _, hint in problems if hint))
    raise JobError("\n".join(lines), hint="; ".join(hints))


def dump_job(job: Job) -> str:
    """Return the job as TOML with all defaults; ``parse_job`` reads an equal job from it.

    ``[data]`` has the keys of the job's own task, and of no other task.
    """
    return tomli_w.dumps(job.model_dump(mode="json", exclude_none=True))


def _override(raw: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise JobError(f"--set {item!r} is not section.key=value", hint="--set rounds.count=5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for part in parts[:-1]:
        raw = raw.setdefault(part, {})
        if not isinstance(raw, dict):
            raise JobError(f"--set {item!r}: {part} is not a section", hint="name section.key")
    raw[parts[-1]] = value


def _one_source_of_labels(raw: dict[str, Any], over: dict[str, Any]) -> None:
    """Let an override of ``labels`` replace the file's ``labels_from``, and the reverse."""
    base, new = raw.get("job"), over.get("job")
    if isinstance(base, dict) and isinstance(new, dict):
        for given, other in (("labels", "labels_from"), ("labels_from", "labels")):
            if given in new and other not in new:
                base.pop(other, None)


def _one_kind_of_method(raw: dict[str, Any], over: dict[str, Any]) -> None:
    """Let an override of ``method.kind`` drop the file's settings for its own kind."""
    base, new = raw.get("method"), over.get("method")
    if not (isinstance(base, dict) and isinstance(new, dict)):
        return
    if new.get("kind", base.get("kind")) != base.get("kind"):
        raw["method"] = {key: value for key, value in base.items() if key == "head"}


def _merge(base: dict[str, Any], over: dict[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _anchor_paths(raw: dict[str, Any], base: Path) -> None:
    """Make the file paths of a raw job absolute, and fill in environment variables."""
    simulation, job, backbone = (raw.get(name) for name in ("simulation", "job", "backbone"))
    start = raw.get("start")
    if isinstance(start, dict) and isinstance(start.get("adapter"), str) and start["adapter"]:
        start["adapter"] = _absolute(start["adapter"], base, "start.adapter")
    if isinstance(simulation, dict):
        for key in PATH_KEYS:
            if isinstance(simulation.get(key), str) and not simulation[key].startswith("builtin:"):
                simulation[key] = _absolute(simulation[key], base, f"simulation.{key}")
    if isinstance(job, dict) and isinstance(job.get("labels_from"), str):
        job["labels_from"] = _absolute(job["labels_from"], base, "job.labels_from")
    for section, key, name in (
        (backbone, "source", "backbone.source"), (simulation, "teacher", "simulation.teacher"),
    ):  # fmt: skip
        if isinstance(section, dict) and str(section.get(key)).startswith("path:"):
            path = section[key].removeprefix("path:")
            if path:  # an empty path is not the working directory
                section[key] = "path:" + _absolute(path, base, name)


def _absolute(text: str, base: Path, key: str) -> str:
    for name in re.findall(r"\$\{?(\w+)\}?", text):
        if name not in os.environ:
            raise JobError(
                f"{key} = {text!r}: the environment variable {name} is not set",
                hint=f"export {name}=..., or --set {key}=PATH",
            )
    return os.path.normpath(base / os.path.expanduser(os.path.expandvars(text)))


def _read_labels(raw: dict[str, Any]) -> None:
    """Replace ``job.labels_from`` (one label per line) by ``job.labels``."""
    section = raw.get("job")
    if not isinstance(section, dict) or "labels_from" not in section:
        return
    path = section.pop("labels_from")
    if "labels" in section:
        raise JobError("job has both labels and labels_from", hint="keep one of them")
    if not isinstance(path, str):
        raise JobError("job.labels_from is not a path", hint='labels_from = "labels.txt"')
    lines = read_text(Path(path)).splitlines()
    section["labels"] = [line.strip() for line in lines if line.strip()]


def _explain(problem: dict[str, Any]) -> tuple[str, str]:
    """Return one pydantic problem as (the error, the hint)."""
    # loc has the discriminator's tag, the file does not: method.lora.rank is method.rank.
    loc = [str(part) for part in problem["loc"]]
    if len(loc) > 1 and loc[0] == "method" and loc[1] in METHODS:
        loc = [loc[0], *loc[2:]]
    if "sites_per_pass" in loc:
        return "simulation.sites_per_pass is no number of sites", '"auto", or 1 to 256'
    key = ".".join(loc) or "job"
    kind = problem["type"]
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(loc[-1], _known_keys(problem["loc"][:-1]), n=1, cutoff=0.5)
        known = ", ".join(_known_keys(problem["loc"][:-1]))
        return f"unknown key {key}", f"did you mean {near[0]}?" if near else f"known: {known}"
    if kind == "missing":
        return f"{key} is missing", f"add {loc[-1]} to [{'.'.join(loc[:-1])}]" if loc[1:] else ""
    if kind.startswith("union_tag"):
        return f"{key}: {problem['msg']}", " or ".join(f'kind = "{kind}"' for kind in METHODS)
    if kind == "model_type":
        return f"{key}: a section, not a value", f"write [{key}] and its keys below it"
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(error := problem.get("ctx", {}).get("error"), UnknownKey):
        return message, error.hint
    given = problem.get("input")
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool) else ""
    if kind == "value_error":
        return f"{key}: {message}{shown}", getattr(problem["ctx"]["error"], "hint", f"mend {key}")
    return f"{key}: {message}{shown}", f"mend {key}"


def _known_keys(loc: tuple[str | int, ...]) -> list[str]:
    """Return the keys of the section at ``loc`` in the job's models."""
    models: list[type[BaseModel]] = [Job]
    for part in loc:
        if loc[0] == "method" and part in METHODS:
            models = [METHODS[str(part)]]
            continue
        fields = [model.model_fields.get(str(part)) for model in models]
        models = [m for field in fields if field for m in _models_in(field.annotation)]
    names = [name for model in models for name in model.model_fields]
    return [*names, "labels_from"] if loc == ("job",) else names


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [m for arg in typing.get_args(annotation) for m in _models_in(arg)]
    return []
