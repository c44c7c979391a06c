"""Who may take part: ``sites.json`` of the coordinator's folder, and what follows from it.

Written by `fedgraft provision` and by the threads of the running coordinator, under a lock and
whole or not at all. The roster (public keys for secure aggregation) and the revocation list are
made from it.
"""

import base64
import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from fedgraft.common.errors import InputError
from fedgraft.common.federation.certificates import load_key, make_crl, revoked
from fedgraft.common.federation.federation_file import Federation, Floor, dump_federation
from fedgraft.common.files import write_text

__all__ = ["NO_AUDIT", "Certificate", "Member", "Registry", "Site", "hash_token"]

SiteState = Literal["invited", "joined", "revoked"]


@dataclass(frozen=True)
class Certificate:
    """One that was issued: its serial number and when it ends (ISO 8601, UTC)."""

    serial: int
    expires: str

    def lives(self, now: datetime) -> bool:
        """Whether it has not ended by itself."""
        return now < datetime.fromisoformat(self.expires)


@dataclass(frozen=True)
class Site:
    """One site: when its kit expires, the hash of its token, and what it joined with.

    The token's hash stays when it was used: ``state`` says whether it still lets anybody in.
    ``certificates`` are those in force, ``dead`` those that are not although they have not ended.
    ``audit_*`` is the last head of its audit that it told, of which round and when; ``audit_lost``
    is how many lines it once had told, if a later head had fewer or others.
    """

    state: SiteState = "invited"
    token: str = ""
    kit_expires: str = ""
    node_key: str = ""
    identity: str = ""
    certificates: tuple[Certificate, ...] = ()
    dead: tuple[Certificate, ...] = ()
    joined: str = ""
    audit_lines: int = 0
    audit_head: str = ""
    audit_run: str = ""
    audit_round: int = 0
    audit_time: str = ""
    audit_lost: int = 0

    def without_ended(self, now: datetime) -> "Site":
        """The site without certificates that have ended by themselves: no list must name them."""
        return replace(
            self,
            certificates=tuple(one for one in self.certificates if one.lives(now)),
            dead=tuple(one for one in self.dead if one.lives(now)),
        )


# Of a site that joins with another identity: its audit is a new one.
NO_AUDIT: Final[Mapping[str, Any]] = {
    one.name: one.default for one in fields(Site) if one.name.startswith("audit_")
}


@dataclass(frozen=True)
class Member:
    """A site that joined and was not revoked; ``node_key`` is the base64 of its key in PEM."""

    name: str
    node_key: str

    @property
    def public_key(self) -> bytes:
        """The P-256 public key that Flower knows the site by, PEM."""
        return base64.b64decode(self.node_key)


class Registry:
    """The sites of the federation whose coordinator's folder is ``home``."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.path = home / "sites.json"

    def sites(self) -> dict[str, Site]:
        """Every site by name, in whatever state.

        Raises:
            InputError: there is no registry in this folder.
        """
        try:
            raw = json.loads(self.path.read_text(encoding="utf-8"))
            return {name: _site(site) for name, site in raw["sites"].items()}
        except FileNotFoundError:
            if (self.home / "ca.pem").exists():  # made anew it would let revoked sites in again
                raise InputError(
                    f"{self.path} is missing", hint="restore it from your backup"
                ) from None
            raise InputError(
                f"{self.home} is not the folder of a coordinator",
                hint="make one: fedgraft provision federation.toml -o kits/",
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                f"{self.path} is damaged", hint="restore it from your backup"
            ) from None

    def members(self) -> dict[str, Member]:
        """The sites that joined and were not revoked."""
        return {
            name: Member(name, site.node_key)
            for name, site in self.sites().items()
            if site.state == "joined"
        }

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Nobody else changes the folder meanwhile: no other process, no other thread.

        Raises:
            InputError: there is no such folder, or it is another user's.
        """
        try:
            file = (self.home / "sites.lock").open("w")
        except OSError:
            raise InputError(
                f"{self.home} is not a coordinator's folder that this user may change",
                hint="name it with --home; it is made by: fedgraft provision federation.toml",
            ) from None
        with file:
            # flock, not lockf: that would let the threads of the coordinator's services through
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def change(self) -> Iterator[dict[str, Site]]:
        """The sites to change; written, with the roster and the revocation list, at the end.

        If the block raises, nothing is written.

        Raises:
            InputError: there is no registry in this folder.
        """
        with self.lock():
            sites = self.sites()
            yield sites
            self.write(
                {name: site.without_ended(datetime.now(UTC)) for name, site in sites.items()}
            )

    def write(self, sites: Mapping[str, Site]) -> None:
        """Write the registry and what follows from it; the caller holds the lock."""
        # The registry last: a revocation that is in it is in the list, too.
        self._write_crl({one.serial for site in sites.values() for one in site.dead})
        self._write_roster(sites)
        text = json.dumps({"sites": {name: asdict(site) for name, site in sites.items()}})
        write_text(self.path, text + "\n")

    def _write_crl(self, serials: set[int]) -> None:
        path = self.home / "crl.pem"
        if path.exists() and revoked(path.read_bytes()) == serials:
            return
        key = load_key((self.home / "ca.key").read_bytes())
        crl = make_crl((self.home / "ca.pem").read_bytes(), key, serials, datetime.now(UTC))
        write_text(path, crl.decode())

    def _write_roster(self, sites: Mapping[str, Site]) -> None:
        keys = {name: site.identity for name, site in sites.items() if site.state == "joined"}
        path = self.home / "roster.toml"
        if not keys:
            path.unlink(missing_ok=True)
            return
        floor = Floor.model_validate_json((self.home / "floor.json").read_bytes())
        text = dump_federation(Federation(secure_aggregation=floor, sites=keys))
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)


def _site(raw: dict[str, Any]) -> Site:
    lists = {key: tuple(Certificate(**one) for one in raw[key]) for key in ("certificates", "dead")}
    return Site(**{**raw, **lists})


def hash_token(token: str) -> str:
    """What is kept of a token: it has 256 bits, so a plain hash cannot be searched."""
    return hashlib.sha256(token.encode()).hexdigest()
