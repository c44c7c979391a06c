"""Who may take part: ``sites.json`` of the coordinator's folder, and what follows from it.

Written by `fedgraft provision` and by the running coordinator, under a lock and whole or not at
all. The roster (public keys for secure aggregation) and the revocation list are made from it.
"""

import base64
import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from fedgraft.common.certificates import load_key, make_crl
from fedgraft.common.errors import InputError
from fedgraft.common.federation import Federation, Floor, dump_federation
from fedgraft.common.files import write_text

__all__ = ["Member", "Registry", "Site", "hash_token"]

State = Literal["invited", "joined", "revoked"]


@dataclass(frozen=True)
class Site:
    """One site: when its kit expires, the hash of its token, and what it joined with.

    ``serials`` are of its certificates, ``dead`` of those that count no more.
    """

    state: State = "invited"
    token: str = ""
    kit_expires: str = ""
    node_key: str = ""
    identity: str = ""
    serials: tuple[int, ...] = ()
    dead: tuple[int, ...] = ()
    joined: str = ""
    audit_lines: int = 0
    audit_head: str = ""


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
            return {
                name: Site(**site | {key: tuple(site[key]) for key in ("serials", "dead")})
                for name, site in raw["sites"].items()
            }
        except FileNotFoundError:
            raise InputError(
                f"{self.home} is not the folder of a coordinator",
                hint="make one: fedgraft provision federation.toml -o kits/",
            ) from None
        except (OSError, ValueError, KeyError, TypeError):
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
    def change(self) -> Iterator[dict[str, Site]]:
        """The sites to change; written, with the roster and the revocation list, at the end."""
        with (self.home / "sites.lock").open("w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            sites = self.sites() if self.path.exists() else {}
            yield sites
            # The registry last: a revocation that is in it is in the list, too.
            self._write_crl(sites)
            self._write_roster(sites)
            text = json.dumps({"sites": {name: asdict(site) for name, site in sites.items()}})
            write_text(self.path, text + "\n")

    def _write_crl(self, sites: Mapping[str, Site]) -> None:
        revoked = [number for site in sites.values() for number in site.dead]
        key = load_key((self.home / "ca.key").read_bytes())
        crl = make_crl((self.home / "ca.pem").read_bytes(), key, revoked, datetime.now(UTC))
        write_text(self.home / "crl.pem", crl.decode())

    def _write_roster(self, sites: Mapping[str, Site]) -> None:
        keys = {name: site.identity for name, site in sites.items() if site.state == "joined"}
        path = self.home / "roster.toml"
        if not keys:
            path.unlink(missing_ok=True)
            return
        floor = Floor.model_validate_json((self.home / "floor.json").read_bytes())
        write_text(path, dump_federation(Federation(secure_aggregation=floor, sites=keys)))

    def report(self, name: str, lines: int, head: str) -> None:
        """Note the head of a site's audit."""
        with self.change() as sites:
            if name in sites:
                sites[name] = replace(sites[name], audit_lines=lines, audit_head=head)


def hash_token(token: str) -> str:
    """What is kept of a token: it has 256 bits, so a plain hash cannot be searched."""
    return hashlib.sha256(token.encode()).hexdigest()
