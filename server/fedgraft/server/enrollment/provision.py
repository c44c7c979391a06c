"""Found a federation: its CA, the coordinator's certificate, and one signed kit for each site.

No private key of a site is made here, because a holder of all keys could act as any site. A site
makes its keys when it joins. The token of a kit lets the site join once.
"""

import os
import secrets
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import Field, ValidationError

from fedgraft.common.errors import InputError
from fedgraft.common.federation.certificates import (
    fingerprint,
    issue_server,
    key_to_pem,
    load_key,
    make_ca,
    make_key,
)
from fedgraft.common.federation.endpoint import Endpoint, split_endpoint
from fedgraft.common.federation.federation_file import Floor, SiteName
from fedgraft.common.federation.kit import Kit, write_kit
from fedgraft.common.files import write_private, write_text
from fedgraft.common.section import Duration, Section
from fedgraft.common.toml import read_text
from fedgraft.server.enrollment.registry import Registry, Site, hash_token

__all__ = ["FederationSpec", "Founded", "found", "load_federation_spec", "renew_kit", "revoke"]

POLICY = """\
# What this site allows. All that is not allowed here is refused.

[model]
# allowed_backbones = { "all-MiniLM-L6-v2" = "sha256:..." }   # none unless named here
allowed_methods = ["lora", "head"]
max_rank = 16

[privacy]
secure_aggregation = "required"   # or "allowed": then a job may have updates sent in clear
min_cohort = 3                    # fewest sites in a sum
max_colluding = 1                 # sites that may help the coordinator without opening it
min_examples = 200
min_local_steps = 4

[limits]
max_rounds = 50
max_bytes_out_per_round = "20MB"
# hours = "20:00-06:00"           # when work is taken up
keep_sent = 3                     # rounds whose sent bytes stay here to be looked at

[metrics]                         # of replies in clear
allowed = ["loss", "accuracy", "f1"]
round_to = 3

[approval]
mode = "ask"                      # or "auto": whatever is within this policy
"""


class About(Section):
    """``[federation]``: its name, the endpoint that sites connect to, and the sites' names."""

    name: str = Field(min_length=1, max_length=60)
    endpoint: Endpoint
    sites: tuple[SiteName, ...] = Field(min_length=1)
    kit_lifetime: Duration = 14 * 86400.0
    certificate_lifetime: Duration = 7 * 86400.0


class FederationSpec(Section):
    """The content of ``federation.toml``, which the coordinator's operator writes."""

    federation: About
    secure_aggregation: Floor = Floor()

    @property
    def host(self) -> str:
        """The host that sites connect to."""
        return split_endpoint(self.federation.endpoint)[0]

    @property
    def port(self) -> int:
        """The port that sites connect to."""
        return int(split_endpoint(self.federation.endpoint)[1])


def load_federation_spec(path: Path) -> FederationSpec:
    """Load and return ``federation.toml``.

    Raises:
        InputError: it is missing or does not describe a federation.
    """
    if not path.exists():
        raise InputError(f"no file {path}", hint="it holds [federation] name, endpoint and sites")
    try:
        spec = FederationSpec.model_validate(tomllib.loads(read_text(path)))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}", hint="mend that line") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{path}: {where}: {message}", hint=f"mend {where}") from None
    _check_names(spec.federation.sites, str(path))
    return spec


def _check_names(names: Sequence[str], where: str) -> None:
    """Raise InputError if two names are equal; nginx, which looks sites up, ignores their case."""
    seen = set[str]()
    for name in names:
        if name.lower() in seen:
            hint = "give each a name of its own; upper and lower case do not tell them apart"
            raise InputError(f"{where}: a site is named twice ({name})", hint=hint)
        seen.add(name.lower())


@dataclass(frozen=True)
class Founded:
    """The result of ``found``: the CA's fingerprint, the new ``kits``, and the sites ``left``.

    ``left`` are sites that the file no longer names. They stay members: only ``revoke`` shuts a
    site out.
    """

    fingerprint: str
    kits: tuple[Path, ...]
    left: tuple[str, ...]


def found(source: Path, home: Path, kits: Path) -> Founded:
    """Found the federation of ``source`` in the folder ``home``, or add the sites that are new.

    One kit for each new site goes into the folder ``kits``. The CA is made once and never again.

    Raises:
        InputError: ``source`` is wrong, changes what sites were promised, or a folder cannot be
            written.
    """
    spec, text = load_federation_spec(source), read_text(source)
    try:
        for folder in (home, kits):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.chmod(home, 0o700)  # also if the folder existed before
        with Registry(home).lock():
            if not (home / "ca.pem").exists():
                _make_ca(spec, home)
            _keep_name_and_floor(spec, home)
            there = Registry(home).sites()  # a site that left the file is still a member
            _check_names(tuple(dict.fromkeys((*there, *spec.federation.sites))), str(source))
            _make_server(spec, home)
            write_text(home / "federation.toml", text)
        with Registry(home).change() as sites:
            new = [name for name in spec.federation.sites if name not in sites]
            written = [_invite(spec, home, kits, name, sites) for name in new]
            left = tuple(name for name in sites if name not in spec.federation.sites)
    except OSError as error:
        raise InputError(
            f"{error.filename} cannot be written: {error.strerror}", hint="check the folder"
        ) from None
    return Founded(fingerprint((home / "ca.pem").read_bytes()), tuple(written), left)


def renew_kit(home: Path, site: str, kits: Path) -> Path:
    """Write a new kit for a site, and return its path; the old kit becomes void.

    The site may not have joined so far, or it must join again.

    Raises:
        InputError: there is no such site.
    """
    _known(Registry(home).sites(), site)
    spec = load_federation_spec(home / "federation.toml")
    kits.mkdir(parents=True, exist_ok=True, mode=0o700)
    with Registry(home).change() as sites:
        # Earlier certificates are revoked: the site or another machine makes new keys.
        return _invite(spec, home, kits, site, sites)


def revoke(home: Path, site: str) -> None:
    """Shut a site out; the running coordinator then also ends the site's open sessions.

    Raises:
        InputError: there is no such site.
    """
    with Registry(home).change() as sites:
        _known(sites, site)
        sites[site] = replace(_without_certificates(sites[site]), state="revoked")


def _known(sites: dict[str, Site], site: str) -> None:
    if site not in sites:
        raise InputError(f"no site {site}", hint=f"there is: {', '.join(sites)}")


def _without_certificates(site: Site) -> Site:
    """Return the site with all its certificates revoked."""
    return replace(site, certificates=(), dead=(*site.dead, *site.certificates))


def _invite(
    spec: FederationSpec, home: Path, kits: Path, name: str, sites: dict[str, Site]
) -> Path:
    token, now = secrets.token_urlsafe(32), datetime.now(UTC)
    expires = now + timedelta(seconds=spec.federation.kit_lifetime)
    before = _without_certificates(sites.get(name, Site()))
    sites[name] = replace(
        before, state="invited", token=hash_token(token), kit_expires=expires.isoformat()
    )
    named = dict.fromkeys((*spec.federation.sites, name))  # a site may be only in the registry
    kit = Kit(
        federation=spec.federation.name,
        site=name,
        endpoint=spec.federation.endpoint,
        ca=(home / "ca.pem").read_text(),
        token=token,
        sites=tuple(named),
        floor=spec.secure_aggregation,
        policy=POLICY,
        issued=now,
        expires=expires,
    )
    path = kits / f"{name}.kit"
    write_kit(kit, load_key((home / "ca.key").read_bytes()), path)
    return path


def _make_ca(spec: FederationSpec, home: Path) -> None:
    key = make_key()
    write_private(home / "secret", secrets.token_bytes(32))
    write_private(home / "ca.key", key_to_pem(key))
    write_text(home / "sites.json", '{"sites": {}}\n')
    write_text(home / "floor.json", spec.secure_aggregation.model_dump_json())
    ca = make_ca(spec.federation.name, key, datetime.now(UTC))
    (home / "crl.pem").unlink(missing_ok=True)  # from an unfinished CA
    write_text(home / "ca.pem", ca.decode())  # last: it marks a complete folder


def _keep_name_and_floor(spec: FederationSpec, home: Path) -> None:
    """Raise InputError if name or floor changed, because sites refuse what their kits do not say.

    A site keeps to the name and the floor of its kit.
    """
    path = home / "federation.toml"
    before = load_federation_spec(path) if path.exists() else spec
    floor = Floor.model_validate_json((home / "floor.json").read_bytes())
    for what, same in (
        ("name", before.federation.name == spec.federation.name),
        ("[secure_aggregation]", floor == spec.secure_aggregation),
    ):
        if not same:
            raise InputError(
                f"{what} is not what the sites' kits say",
                hint="put it back, or found another federation with --home",
            )


def _make_server(spec: FederationSpec, home: Path) -> None:
    """Write a new server certificate each time, so that the endpoint may change.

    Its key is made only once, so that a running coordinator never finds a certificate with another
    key.
    """
    if not (home / "server.key").exists():
        write_private(home / "server.key", key_to_pem(make_key()))
    ca, public = (home / "ca.pem").read_bytes(), load_key((home / "server.key").read_bytes())
    ca_key = load_key((home / "ca.key").read_bytes())
    now = datetime.now(UTC)
    server = issue_server(ca, ca_key, public.public_key(), host=spec.host, now=now)
    write_text(home / "server.pem", server.decode())
