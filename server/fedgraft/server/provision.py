"""Found a federation: its CA, the coordinator's certificate, and one signed kit for each site.

No private key of a site is made here: who holds all keys can act as any site. A site makes its own
when it joins, and the kit's token lets it in once.
"""

import os
import secrets
import tomllib
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import Field, ValidationError

from fedgraft.common.certificates import (
    fingerprint,
    issue_server,
    key_to_pem,
    load_key,
    make_ca,
    make_key,
)
from fedgraft.common.errors import InputError
from fedgraft.common.federation import Floor, SiteName
from fedgraft.common.files import write_private, write_text
from fedgraft.common.jobfile import read_text
from fedgraft.common.kit import Endpoint, Kit, write_kit
from fedgraft.common.section import Duration, Section
from fedgraft.server.registry import Registry, Site, hash_token

__all__ = ["Plan", "found", "load_plan", "renew_kit", "revoke"]

POLICY = """\
# What this site allows. All that is not allowed here is refused.

[model]
# allowed_backbones = { "all-MiniLM-L6-v2" = "sha256:..." }   # fedgraft fetch says the digest
allowed_methods = ["lora", "head"]
max_rank = 16

[privacy]
secure_aggregation = "required"   # or "allowed": then a job may have updates sent in clear
min_cohort = 3
min_examples = 200

[limits]
max_rounds = 50
max_bytes_out_per_round = "20MB"

[metrics]
allowed = ["loss", "accuracy", "f1"]

[approval]
mode = "ask"                      # or "auto": whatever is within this policy
"""


class About(Section):
    """``[federation]``: its name, where sites connect, and who they are."""

    name: str = Field(min_length=1, max_length=60)
    endpoint: Endpoint
    sites: tuple[SiteName, ...] = Field(min_length=1)
    kit_lifetime: Duration = 14 * 86400.0
    certificate_lifetime: Duration = 7 * 86400.0


class Plan(Section):
    """``federation.toml`` as the coordinator writes it."""

    federation: About
    secure_aggregation: Floor = Floor()

    @property
    def host(self) -> str:
        """The host that sites connect to."""
        return self.federation.endpoint.rpartition(":")[0].strip("[]")


def load_plan(path: Path) -> Plan:
    """Load ``federation.toml``.

    Raises:
        InputError: it is missing or does not describe a federation.
    """
    if not path.exists():
        raise InputError(f"no file {path}", hint="it holds [federation] name, endpoint and sites")
    try:
        plan = Plan.model_validate(tomllib.loads(read_text(path)))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}", hint="mend that line") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{path}: {where}: {message}", hint=f"mend {where}") from None
    names = plan.federation.sites
    if len(set(names)) < len(names):
        raise InputError(f"{path}: a site is named twice", hint="give each a name of its own")
    return plan


def found(source: Path, home: Path, kits: Path) -> tuple[str, list[Path]]:
    """Found the federation of ``source`` in the folder ``home``, or add the sites that are new.

    One kit for each new site goes into the folder ``kits``; the CA's fingerprint comes back.

    Raises:
        InputError: ``source`` is wrong, or a folder cannot be written.
    """
    plan = load_plan(source)
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        kits.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (home / "ca.pem").exists():
            _make_ca(plan, home)
        _make_server(plan, home)
        write_text(home / "federation.toml", read_text(source))
        write_text(home / "floor.json", plan.secure_aggregation.model_dump_json())
    except OSError as error:
        raise InputError(
            f"{error.filename} cannot be written: {error.strerror}", hint="check the folder"
        ) from None
    with Registry(home).change() as sites:
        new = [name for name in plan.federation.sites if name not in sites]
        written = [_invite(plan, home, kits, name, sites) for name in new]
    return fingerprint((home / "ca.pem").read_bytes()), written


def renew_kit(home: Path, site: str, kits: Path) -> Path:
    """A new kit for a site that may not have joined, or that must join again; the old one is void.

    Raises:
        InputError: there is no such site.
    """
    plan = load_plan(home / "federation.toml")
    with Registry(home).change() as sites:
        _known(sites, site)
        kits.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Certificates of before are revoked: the site makes keys anew, or another machine does.
        return _invite(plan, home, kits, site, sites)


def revoke(home: Path, site: str) -> None:
    """Shut a site out, open sessions included once the running coordinator sees it.

    Raises:
        InputError: there is no such site.
    """
    with Registry(home).change() as sites:
        _known(sites, site)
        sites[site] = replace(_without_certificates(sites[site]), state="revoked", token="")


def _known(sites: dict[str, Site], site: str) -> None:
    if site not in sites:
        raise InputError(f"no site {site}", hint=f"there is: {', '.join(sites)}")


def _without_certificates(site: Site) -> Site:
    """The site, and what it has of certificates revoked."""
    return replace(site, serials=(), dead=(*site.dead, *site.serials))


def _invite(plan: Plan, home: Path, kits: Path, name: str, sites: dict[str, Site]) -> Path:
    token, now = secrets.token_urlsafe(32), datetime.now(UTC)
    expires = now + timedelta(seconds=plan.federation.kit_lifetime)
    before = _without_certificates(sites.get(name, Site()))
    sites[name] = replace(
        before, state="invited", token=hash_token(token), kit_expires=expires.isoformat()
    )
    kit = Kit(
        federation=plan.federation.name,
        site=name,
        endpoint=plan.federation.endpoint,
        ca=(home / "ca.pem").read_text(),
        token=token,
        sites=plan.federation.sites,
        floor=plan.secure_aggregation,
        policy=POLICY,
        issued=now,
        expires=expires,
    )
    path = kits / f"{name}.kit"
    write_kit(kit, load_key((home / "ca.key").read_bytes()), path)
    return path


def _make_ca(plan: Plan, home: Path) -> None:
    key = make_key()
    write_private(home / "secret", secrets.token_bytes(32))
    write_private(home / "ca.key", key_to_pem(key))
    ca = make_ca(plan.federation.name, key, datetime.now(UTC))
    write_text(home / "ca.pem", ca.decode())  # last: with it the folder is founded


def _make_server(plan: Plan, home: Path) -> None:
    """The server certificate: made anew each time, so that the endpoint may change."""
    ca, key = (home / "ca.pem").read_bytes(), make_key()
    ca_key = load_key((home / "ca.key").read_bytes())
    now = datetime.now(UTC)
    server = issue_server(ca, ca_key, key.public_key(), host=plan.host, now=now)
    write_private(home / "server.key", key_to_pem(key))
    write_text(home / "server.pem", server.decode())
    os.chmod(home / "server.pem", 0o644)
