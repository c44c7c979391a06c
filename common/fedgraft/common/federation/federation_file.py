"""``federation.toml``: the sites by name and public key, and the floor of secure aggregation.

The file comes with a site's kit and is stored at every site and at the coordinator; it is never
taken from a message. A site's id in secure aggregation is the position of its name in the sorted
list of names.
"""

import re
import tomllib
from functools import cached_property
from pathlib import Path
from typing import Annotated

import tomli_w
from pydantic import AfterValidator, Field, ValidationError, model_validator

from fedgraft.common.errors import JobError
from fedgraft.common.secagg.errors import ParameterError
from fedgraft.common.secagg.transcript import Policy, Roster
from fedgraft.common.section import IllegalJob, Section
from fedgraft.common.toml import read_text

__all__ = [
    "Federation",
    "Floor",
    "SiteName",
    "dump_federation",
    "load_federation",
    "parse_federation",
]


def _check_site_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", value):
        raise ValueError(
            "a site's name is of letters without accents, digits, _ . and -, without spaces, and "
            "begins with a letter or digit (64 at most)"
        )
    return value


SiteName = Annotated[str, AfterValidator(_check_site_name)]
PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Floor(Section):
    """``[secure_aggregation]``: the least protection that every site requires, for every job.

    ``colluders`` is the smallest number of sites that must be assumed to work with the coordinator.
    ``min_cohort`` is the smallest number of sites in a sum. ``max_clip`` limits the effect of one
    site on a coordinate.
    """

    colluders: int = Field(default=1, ge=1)
    min_cohort: int = Field(default=3, ge=3)
    min_ring_bits: int = Field(default=24, ge=16, le=32)
    max_clip: float = Field(default=1.0, gt=0)


class Federation(Section):
    """The sites, each with its Ed25519 public key in hex, and the floor."""

    secure_aggregation: Floor = Floor()
    sites: dict[SiteName, PublicKey] = Field(min_length=1)

    @model_validator(mode="after")
    def _keys_differ(self) -> "Federation":
        try:
            _ = self.roster
        except ParameterError:
            raise IllegalJob(
                "two sites have one key", "every site makes a key of its own"
            ) from None
        return self

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Return the sites' names, sorted: a site's id is its position here."""
        return tuple(sorted(self.sites))

    @cached_property
    def ids(self) -> dict[str, int]:
        """Return the id of each site by its name."""
        return {name: place for place, name in enumerate(self.names)}

    @cached_property
    def roster(self) -> Roster:
        """Return the public keys in the order of the names."""
        return Roster(tuple(bytes.fromhex(self.sites[name]) for name in self.names))

    def key_of(self, site: str) -> bytes | None:
        """Return the public key of a site, 32 bytes; None if the site is not a member."""
        key = self.sites.get(site)
        return bytes.fromhex(key) if key else None

    @property
    def policy(self) -> Policy:
        """Return the floor in the form that secure aggregation checks."""
        floor = self.secure_aggregation
        return Policy(floor.colluders, floor.min_cohort, floor.min_ring_bits, floor.max_clip)


def load_federation(path: Path) -> Federation:
    """Return the federation in the ``federation.toml`` at ``path``.

    Raises:
        JobError: it is missing, is not UTF-8 TOML, or does not describe a federation.
    """
    if not path.exists():
        raise JobError(
            f"no file {path}",
            hint="it holds [sites] with a public key each; it comes with the federation's kit",
        )
    return parse_federation(read_text(path), str(path))


def parse_federation(text: str, where: str) -> Federation:
    """Return the federation that ``text`` (TOML) describes; errors give its source ``where``.

    Raises:
        JobError: it does not describe a federation.
    """
    try:
        return Federation.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise JobError(f"{where} is not valid TOML: {error}", hint="mend that line") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        hint = "[sites] maps a site's name to its Ed25519 public key, 64 hex digits"
        if key.startswith("secure_aggregation"):
            hint = f"mend {key}"
        own = getattr(first.get("ctx", {}).get("error"), "hint", hint)
        raise JobError(f"{where}: {key or 'sites'}: {message}", hint=own) from None


def dump_federation(federation: Federation) -> str:
    """Return the federation as TOML, which ``load_federation`` reads."""
    return tomli_w.dumps(federation.model_dump(mode="json"))
