"""The registry of sites: ``sites.json`` in the coordinator's folder, and the files made from it.

`fedgraft provision` and the threads of the running coordinator write the registry, under a lock and
always as a whole. The roster (public keys for secure aggregation) and the revocation list are made
from it.
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
    """An issued certificate: its serial number and the time when it expires (ISO 8601, UTC)."""

    serial: int
    expires: str

    def lives(self, now: datetime) -> bool:
        """Return whether the certificate has not expired."""
        return now < datetime.fromisoformat(self.expires)


@dataclass(frozen=True)
class Site:
    """One site: the expiry of its kit, the hash of its token, and the keys that it joined with.

    The hash of a used token is kept; ``state`` says whether the token still lets a site join.
    ``certificates`` are those in force. ``dead`` are revoked certificates that have not expired.
    ``audit_*`` is the last head that the site reported of its audit, with its run, round and time.
    ``audit_lost`` is the number of lines that the site had reported, if a later head had fewer
    lines or others.
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
        """Return the site without expired certificates, which no list needs to name."""
        return replace(
            self,
            certificates=tuple(one for one in self.certificates if one.lives(now)),
            dead=tuple(one for one in self.dead if one.lives(now)),
        )


# A site that joins with another identity begins a new audit.
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
        """The P-256 public key by which Flower knows the site, PEM."""
        return base64.b64decode(self.node_key)


class Registry:
    """The sites of the federation whose coordinator's folder is ``home``."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.path = home / "sites.json"

    def sites(self) -> dict[str, Site]:
        """Return every site by name, in any state.

        Raises:
            InputError: there is no registry in this folder.
        """
        try:
            raw = json.loads(self.path.read_text(encoding="utf-8"))
            return {name: _site(site) for name, site in raw["sites"].items()}
        except FileNotFoundError:
            if (self.home / "ca.pem").exists():  # a new one would let revoked sites in again
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
        """Return the sites that joined and were not revoked, by name."""
        return {
            name: Member(name, site.node_key)
            for name, site in self.sites().items()
            if site.state == "joined"
        }

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder: no other process and no other thread changes it in this context.

        Raises:
            InputError: there is no such folder, or it belongs to another user.
        """
        try:
            file = (self.home / "sites.lock").open("w")
        except OSError:
            raise InputError(
                f"{self.home} is not a coordinator's folder that this user may change",
                hint="name it with --home; it is made by: fedgraft provision federation.toml",
            ) from None
        with file:
            # flock, not lockf: lockf does not lock the threads of one process against each other
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def change(self) -> Iterator[dict[str, Site]]:
        """Yield the sites to change; write them, the roster and the revocation list at the end.

        If the block raises an exception, nothing is written.

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
        """Write the registry, the roster and the revocation list; the caller holds the lock."""
        # The registry comes last, so that each revocation in it is in the revocation list, too.
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
    """Return the hash that is kept of a token.

    A plain hash is enough: the token has 256 bits, so no search can find it from the hash.
    """
    return hashlib.sha256(token.encode()).hexdigest()
