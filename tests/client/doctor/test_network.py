"""The doctor on the way to the coordinator: each layer broken on purpose."""

import socket

import grpc
import pytest
from support.clinic import CANARY, NETWORK, Authority, Coordinator, Site, look, states


def test_a_name_that_does_not_resolve(site: Site) -> None:
    site.endpoint("nowhere.invalid:8443")
    found = look(site)
    assert found["name"].what == "nowhere.invalid does not resolve here"
    assert states(found) == {"name": "fail", **dict.fromkeys(NETWORK[1:], "skipped")}


def test_a_closed_port(site: Site) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        site.endpoint(f"127.0.0.1:{taken.getsockname()[1]}")
        found = look(site)
    assert "refuses port" in found["tcp"].what
    assert states(found) == {"tcp": "fail", **dict.fromkeys(NETWORK[2:], "skipped")}


def test_a_port_that_speaks_no_tls(site: Site) -> None:
    with socket.socket() as plain:
        plain.bind(("127.0.0.1", 0))
        plain.listen()
        site.endpoint(f"127.0.0.1:{plain.getsockname()[1]}")
        import fedgraft.client.doctor.network as network

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(network, "PATIENCE", 0.3)
            found = look(site)
    assert "no TLS on port" in found["tls"].what


def test_a_coordinator_of_another_ca(site: Site, coordinator: Coordinator) -> None:
    with coordinator.serve(Authority()) as port:  # of the same name
        site.endpoint(f"localhost:{port}")
        found = look(site)
    assert found["tls"].what.startswith("wrong CA")
    assert states(found) == {"tls": "fail", **dict.fromkeys(NETWORK[3:], "skipped")}


def test_a_coordinator_whose_certificate_expired(
    site: Site, authority: Authority, coordinator: Coordinator
) -> None:
    with coordinator.serve(authority, age=900) as port:
        site.endpoint(f"localhost:{port}")
        assert look(site)["tls"].what.startswith("expired")
    with coordinator.serve(authority, age=-2) as port:
        site.endpoint(f"localhost:{port}")
        assert look(site)["tls"].what.startswith("not valid yet")


def test_a_coordinator_of_another_name(site: Site, coordinator: Coordinator) -> None:
    with coordinator.serve(site.authority) as port:  # for localhost and 127.0.0.1 alone
        site.endpoint(f"127.0.0.2:{port}")
        assert look(site)["tls"].what == "host name: the certificate is not for 127.0.0.2"


@pytest.mark.parametrize("status", ["UNAUTHENTICATED", "PERMISSION_DENIED"])
def test_a_site_that_is_shut_out(site: Site, coordinator: Coordinator, status: str) -> None:
    coordinator.refuse = grpc.StatusCode[status]
    found = look(site)
    assert found["coordinator"].what == "certificate revoked or unknown"
    assert "new kit" in found["coordinator"].hint
    assert states(found) == {"coordinator": "fail", **dict.fromkeys(NETWORK[4:], "skipped")}


def test_a_coordinator_that_is_broken_is_no_revocation(
    site: Site, coordinator: Coordinator
) -> None:
    coordinator.refuse = grpc.StatusCode.UNAVAILABLE
    assert look(site)["coordinator"].what == "no answer (unavailable)"
    coordinator.refuse = grpc.StatusCode.UNIMPLEMENTED
    assert look(site)["coordinator"].what == "it refuses: unimplemented"


@pytest.mark.parametrize(
    ("ahead", "state", "what"),
    [
        (1.0, "ok", "1.0 s behind"),
        (55.0, "ok", "55.0 s behind"),
        (65.0, "fail", "65.0 s behind"),
        (-1.0, "ok", "1.0 s ahead of"),
        (-3.0, "fail", "3.0 s ahead of"),
    ],
)
def test_the_clock(
    site: Site, coordinator: Coordinator, ahead: float, state: str, what: str
) -> None:
    coordinator.ahead = ahead
    found = look(site)
    assert found["clock"].state == state
    assert what in found["clock"].what
    assert ("timedatectl" in found["clock"].hint) == (state == "fail")


def test_proxies_are_named_without_their_passwords(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:{CANARY}@proxy.invalid:3128")
    found = look(site)
    assert states(found) == {"proxies": "warn"}
    assert "HTTPS_PROXY" in found["proxies"].what
    assert "lower case" in found["proxies"].hint
    monkeypatch.setenv("no_proxy", "localhost")
    assert look(site)["proxies"].state == "ok"


def test_layers_that_a_proxy_hides_are_left_out(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr("fedgraft.client.doctor.network.PATIENCE", 1.0)
    found = look(site)
    assert [found[name].state for name in NETWORK[:4]] == [*["skipped"] * 3, "fail"]
