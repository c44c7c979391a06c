"""An endpoint that sites cannot dial is refused in words, before any kit is made."""

import socket
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from fedgraft.common.errors import InputError
from fedgraft.common.federation.endpoint import Endpoint, check_endpoint, split_endpoint
from fedgraft.common.federation.federation_file import SiteName
from fedgraft.server.coordinator import nginx
from fedgraft.server.coordinator.nginx import NginxConfig, addresses_for, check_listen
from fedgraft.server.enrollment.provision import load_federation_spec

GOOD = {
    "fl.example.org:8443": ("fl.example.org", "8443"),
    "FL-1.Example:1": ("FL-1.Example", "1"),
    "localhost:65535": ("localhost", "65535"),
    "127.0.0.1:8443": ("127.0.0.1", "8443"),
    "[::1]:8443": ("::1", "8443"),
    "[2001:db8::5]:8443": ("2001:db8::5", "8443"),
    "[::ffff:10.0.0.1]:8443": ("::ffff:10.0.0.1", "8443"),
    "xn--bcher-kva.example:8443": ("xn--bcher-kva.example", "8443"),
}
BAD = {
    "https://fl.example.org:8443": "no https:// in front",
    "grpc://fl:8443": "no grpc:// in front",
    "fl.example.org": "the port is missing",
    "[::1]": "the port is missing",
    "fl.example.org:": "the port is missing",
    "fl:0": "no port from 1 to 65535",
    "fl:99999": "no port from 1 to 65535",
    "fl:http": "no port from 1 to 65535",
    "fl:8443/path": "has no path",
    "me@fl:8443": "has no user",
    "fl_server:8443": "no underscore",
    "-fl:8443": "letters, digits, - and .",
    "fl.example.:8443": "no dot at the end",
    "fl example:8443": "no space",
    "": "not empty",
    "bücher.example:8443": "xn--",
    "2001:db8::5:8443": "stands in brackets",
    "::1:8443": "stands in brackets",
    "[fe80::1%eth0]:8443": "a zone",
    "[fl.example]:8443": "in brackets stands an IPv6 address",
    "[127.0.0.1]:8443": "brackets are for IPv6",
    "0.0.0.0:8443": "nobody can dial",
    "[::]:8443": "nobody can dial",
    "300.1.1.1:8443": "no IPv4 address",
}


@pytest.mark.parametrize("value", GOOD)
def test_what_sites_can_dial_is_accepted(value: str) -> None:
    assert check_endpoint(value) == value and split_endpoint(value) == GOOD[value]


@pytest.mark.parametrize("value", BAD)
def test_what_they_cannot_is_explained(value: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=BAD[value]):
        TypeAdapter(Endpoint).validate_python(value)
    path = tmp_path / "federation.toml"
    path.write_text(
        f'[federation]\nname = "x"\nendpoint = "{value}"\nsites = ["a", "b", "c"]\n', "utf-8"
    )
    with pytest.raises(InputError, match=BAD[value]) as caught:
        load_federation_spec(path)
    assert "pattern" not in str(caught.value) + caught.value.hint


@pytest.mark.parametrize("name", ["st. mary", "é", "", "-a", "a" * 65, "a/b"])
def test_a_sites_name_is_explained_too(name: str) -> None:
    with pytest.raises(ValidationError, match="of letters without accents"):
        TypeAdapter(SiteName).validate_python(name)


def test_it_is_listened_where_sites_dial(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert addresses_for("10.0.0.7", 8443) == "0.0.0.0:8443"
    assert addresses_for("::1", 8443) == "[::]:8443"
    both = [(socket.AF_INET, 0, 0, "", ()), (socket.AF_INET6, 0, 0, "", ())]
    monkeypatch.setattr(nginx, "_has_ipv6", lambda: True)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    assert addresses_for("fl.example", 8443) == "0.0.0.0:8443 [::]:8443"
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both[:1])
    assert addresses_for("fl.example", 8443) == "0.0.0.0:8443"
    nginx.write_nginx_config(NginxConfig(tmp_path, "0.0.0.0:8443 [::]:8443", 1, {}))
    text = (tmp_path / "nginx" / "nginx.conf").read_text()
    for address in ("0.0.0.0:8443", "[::]:8443"):
        assert text.count(f"    listen {address} ssl http2;\n") == 1


def test_a_name_that_is_not_known_here_is_listened_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert addresses_for("known.to.sites", 8443) == "0.0.0.0:8443"


def test_who_holds_a_port_is_named() -> None:
    import os

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = check_listen(f"127.0.0.1:{port}")
    assert said.startswith(f"port {port} is in use by ") and f"(process {os.getpid()})" in said
    assert check_listen(f"127.0.0.1:{port}") == ""


def test_a_port_without_its_colon_is_no_port() -> None:
    with pytest.raises(ValueError, match="the port is missing"):
        check_endpoint("[2001:db8::5]8443")
