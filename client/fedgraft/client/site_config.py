"""The site's own configuration, ``site.toml``: the paths of its data, and the site's own names.

The site writes this file and reads it. Nothing in it is ever fetched from a coordinator or sent to
one, so a job cannot point a site at other data.
"""

import os
import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import Field, ValidationError

from fedgraft.common.errors import JobError
from fedgraft.common.section import Cache, Section
from fedgraft.common.toml import explain_problem, read_text

__all__ = ["SiteConfig", "SiteData", "dump_site", "load_site"]


class SiteData(Section):
    """``[data]``: files, folders or globs, and how the site's own names map to the job's.

    ``columns`` maps a column of the job's schema to the site's own column. ``labels`` maps a value
    of the site's own label column to the job's name of that label. With ``labelled = false``,
    labels of the training files are not read: the site then takes part only in jobs with domain
    adaptation.
    """

    train: str = Field(min_length=1)
    test: str | None = Field(default=None, min_length=1)
    validation: str | None = Field(default=None, min_length=1)
    labelled: bool = True
    columns: dict[str, str] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)


class SiteConfig(Section):
    """One site: its name, its data, its device, and the folder ``state`` for its files.

    ``federation`` is the path of the federation file; with one, updates leave only masked, unless
    the policy says otherwise. ``policy`` is the path of the site's policy; with one, every message
    that comes or leaves is checked against it and audited. ``rank`` limits the LoRA rank that this
    site trains of a job. ``teacher`` is the model that a job with distillation learns from here; it
    is named like a job's backbone. ``cache`` limits the size of the cache that saves time.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    state: str = Field(default="state", min_length=1)
    federation: str | None = Field(default=None, min_length=1)
    policy: str | None = Field(default=None, min_length=1)
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    rank: int | None = Field(default=None, ge=1)
    teacher: str | None = Field(default=None, pattern=r"^(hf|path|builtin):.+$")
    cache: Cache = Cache()
    data: SiteData


def load_site(path: Path) -> SiteConfig:
    """Load the ``site.toml`` at ``path``; relative paths in it start from the file's folder.

    Raises:
        JobError: the file is missing, is not UTF-8 TOML, or does not describe a site.
    """
    if not path.exists():
        raise JobError(
            f"no file {path}",
            hint="it holds the site's name and [data] with the path of its training data",
        )
    return _anchored(_parsed(path, read_text(path)), path.parent.resolve())


@lru_cache(maxsize=256)
def _parsed(path: Path, text: str) -> SiteConfig:
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise JobError(f"{path} is not valid TOML: {error}", hint="mend that line") from None
    try:
        return SiteConfig.model_validate(raw)
    except ValidationError as error:
        problems = [_explain(dict(item)) for item in error.errors()]
        lines = "\n".join(f"{path}: {what}" for what, _ in problems)
        hints = dict.fromkeys(hint for _, hint in problems if hint)
        raise JobError(lines, hint="; ".join(hints)) from None


def dump_site(config: SiteConfig) -> str:
    """Return the configuration as TOML, which ``load_site`` reads back."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _anchored(config: SiteConfig, base: Path) -> SiteConfig:
    def absolute(text: str) -> str:
        return os.path.normpath(base / os.path.expanduser(text))

    named = ("train", "test", "validation")
    paths = {name: absolute(text) for name in named if (text := getattr(config.data, name))}
    data = config.data.model_copy(update=paths)
    here = {"state": absolute(config.state), "data": data}
    here |= {
        name: absolute(text) for name in ("federation", "policy") if (text := getattr(config, name))
    }
    if config.teacher is not None and config.teacher.startswith("path:"):
        here["teacher"] = "path:" + absolute(config.teacher.removeprefix("path:"))
    return config.model_copy(update=here)


def _explain(problem: dict[str, Any]) -> tuple[str, str]:
    """Return one pydantic problem as (what is wrong, what to do)."""
    if problem["loc"] == ("name",) and problem["type"] != "missing":
        return "name is not a site name", "letters, digits, dot, dash and underscore, at most 64"
    return explain_problem(problem, SiteConfig)
