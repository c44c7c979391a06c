"""The endpoint that sites dial: HOST:PORT, checked and explained in words."""

import ipaddress
import re
from typing import Annotated

from pydantic import AfterValidator

__all__ = ["Endpoint", "check_endpoint", "split_endpoint"]

EXAMPLE = "write it as host:8443"


def check_endpoint(value: str) -> str:
    """Return ``value`` if sites can dial it.

    A host is a name, an IPv4 address, or an IPv6 address in brackets (RFC 3986, section 3.2.2).

    Raises:
        ValueError: it is not; the message says what to write instead.
    """
    if "://" in value:
        raise ValueError(f"no {value.partition('://')[0]}:// in front: {EXAMPLE}")
    for sign, what in (("/", "path"), ("@", "user"), ("?", "question"), ("#", "fragment")):
        if sign in value:
            raise ValueError(f"an endpoint has no {what} ({sign}): {EXAMPLE}")
    if not value or any(sign.isspace() for sign in value):
        raise ValueError(f"an endpoint is not empty and has no space: {EXAMPLE}")
    if value.count(":") > 1 and not value.startswith("["):
        raise ValueError("an IPv6 address stands in brackets: [2001:db8::5]:8443")
    host, port = split_endpoint(value)
    if not port:
        raise ValueError(f"the port is missing: {EXAMPLE}")
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ValueError(f"{port!r} is no port from 1 to 65535: {EXAMPLE}")
    _check_host(host, bracketed=value.startswith("["))
    return value


def split_endpoint(value: str) -> tuple[str, str]:
    """Return host and port of HOST:PORT: the host without brackets; the port may be empty."""
    if value.startswith("["):
        host, _, rest = value[1:].partition("]")
        return (host, rest[1:]) if rest.startswith(":") else (host, "")
    host, _, port = value.partition(":")
    return host, port


def _check_host(host: str, *, bracketed: bool) -> None:
    if "%" in host:
        raise ValueError("a zone (%) is of one machine alone: write an address without it")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if bracketed:
            raise ValueError("in brackets stands an IPv6 address: [2001:db8::5]:8443") from None
        _check_name(host)
        return
    if bracketed != (address.version == 6):
        raise ValueError("brackets are for IPv6 addresses alone")
    if address.is_unspecified or address.is_multicast:
        raise ValueError(f"nobody can dial {host}: write the address or name that sites reach")


def _check_name(host: str) -> None:
    if not host.isascii():
        raise ValueError("a host name in other letters is written in its form for DNS (xn--...)")
    if host.endswith("."):
        raise ValueError("no dot at the end of the host")
    if re.fullmatch(r"[0-9.]+", host):
        raise ValueError(f"{host} is no IPv4 address: four numbers from 0 to 255")
    label = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
    if not re.fullmatch(rf"{label}(\.{label})*", host) or len(host) > 253:
        raise ValueError("a host is of letters, digits, - and . (no underscore), as fl.example")


Endpoint = Annotated[str, AfterValidator(check_endpoint)]
