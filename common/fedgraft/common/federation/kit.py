"""A kit: one signed file with which a site joins. It contains no private key.

``{"kit": {...}, "signature": hex}``: ECDSA by the federation's CA over the canonical JSON of the
kit. The CA itself is in the kit. The fingerprint, which the site gets by another way, shows that it
is the right CA. The token lets one site in, once, before the kit expires.
"""

import hmac
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import AwareDatetime, Field, ValidationError, model_validator

from fedgraft.common.errors import InputError
from fedgraft.common.federation.certificates import fingerprint, sign, verify
from fedgraft.common.federation.endpoint import Endpoint
from fedgraft.common.federation.federation_file import Floor, SiteName
from fedgraft.common.files import write_private
from fedgraft.common.section import IllegalJob, Section

__all__ = ["Kit", "enrolment_statement", "open_kit", "sign_kit", "write_kit"]

FEWEST_DIGITS = 32  # of a fingerprint: no trial can hit the same 128 bits
LARGEST = 1_000_000


class Kit(Section):
    """The content of the file; times in UTC."""

    format: Literal[1] = 1
    federation: str
    site: SiteName
    endpoint: Endpoint
    ca: str
    token: str = Field(min_length=32)
    sites: tuple[SiteName, ...]
    floor: Floor
    policy: str
    issued: AwareDatetime
    expires: AwareDatetime

    @model_validator(mode="after")
    def _names_its_site(self) -> "Kit":
        if self.site not in self.sites:
            raise IllegalJob("the kit's site is not among its sites", "name it there")
        return self


def write_kit(kit: Kit, key: ec.EllipticCurvePrivateKey, path: Path) -> None:
    """Sign the kit and write it to ``path``, readable by this user only: the token is a secret."""
    write_private(path, sign_kit(kit, key))


def sign_kit(kit: Kit, key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the kit's file, signed with the CA's key."""
    inner = kit.model_dump(mode="json")
    signed = {"kit": inner, "signature": sign(key, _canonical(inner)).hex()}
    return json.dumps(signed, indent=1).encode()


def enrolment_statement(site: str, csr: bytes) -> bytes:
    """Return the text that a site signs with its identity when it joins: this request is mine."""
    return b"fedgraft-enrol/1\n" + site.encode() + b"\n" + csr


def open_kit(path: Path, told: str, now: datetime) -> Kit:
    """Return the kit in ``path``, if its CA has the fingerprint that the site was ``told``.

    Raises:
        InputError: it is missing, malformed, changed, expired, or from another CA.
    """
    again = "ask the coordinator for the kit again"
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError
        raw = json.loads(path.read_bytes())
        kit = Kit.model_validate_json(json.dumps(raw["kit"]))
        signature, own = bytes.fromhex(raw["signature"]), fingerprint(kit.ca.encode())
    except FileNotFoundError:
        raise InputError(f"no file {path}", hint="name the .kit file you were sent") from None
    except (OSError, ValueError, TypeError, KeyError, ValidationError, RecursionError):
        raise InputError(f"{path} is not a kit", hint=again) from None
    digits = re.sub(r"[\s:]", "", told).lower().removeprefix("sha256")
    if not re.fullmatch(rf"[0-9a-f]{{{FEWEST_DIGITS},64}}", digits):
        raise InputError(
            "the fingerprint has to be 64 hex digits, or at least the first 32",
            hint="the coordinator tells it by another way than the kit: by phone, on paper",
        )
    if not hmac.compare_digest(own[: len(digits)], digits):
        raise InputError(
            f"{path} is of another federation, or was changed: its CA is {own}",
            hint="compare the fingerprint with the coordinator by phone; do not join",
        )
    if not verify(kit.ca.encode(), signature, _canonical(raw["kit"])):
        raise InputError(f"{path} was changed after it was signed", hint=again)
    if now >= kit.expires:
        raise InputError(
            f"{path} expired on {kit.expires:%Y-%m-%d}",
            hint=f"ask the coordinator to renew it: fedgraft provision renew {kit.site}",
        )
    return kit


def _canonical(inner: dict[str, Any]) -> bytes:
    """Return the text to sign: the file's own content.

    So no default replaces a value that was removed from the file.
    """
    return json.dumps(inner, sort_keys=True, separators=(",", ":")).encode()
