"""nginx's configuration: one that nginx takes whatever sites are called, and that says who may."""

import base64
import re
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.matrix import tries
from support.memberships import write_plan
from support.programs import find

from fedgraft.common.federation.certificates import make_key, public_pem
from fedgraft.server.coordinator.nginx import NginxConfig, nginx_command, write_nginx_config
from fedgraft.server.enrollment.provision import found

SITE = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"
KEYS = [base64.b64encode(public_pem(make_key().public_key())).decode() for _ in range(3)]
names = st.lists(
    st.from_regex(SITE, fullmatch=True), max_size=6, unique_by=lambda name: name.lower()
)
ODD = ("default", "include", "hostnames", "volatile", "a", "a.b", "a-b", "0", "x" * 64)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("f")
    found(write_plan(folder), folder / "coordinator", folder / "kits")
    (folder / "coordinator" / "run").mkdir()
    return folder / "coordinator"


def front_of(home: Path, members: Mapping[str, str]) -> NginxConfig:
    return NginxConfig(home, "127.0.0.1:8443", 9092, members)


def written(front: NginxConfig) -> str:
    write_nginx_config(front)
    return (front.folder / "nginx.conf").read_text()


def takes(front: NginxConfig) -> str:
    """What `nginx -t` says to the configuration; it must take it."""
    nginx = str(find("nginx", source="Debian's package nginx-light"))
    done = subprocess.run(
        [*nginx_command(front, nginx), "-t"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def block(text: str, head: str) -> str:
    """What is between the braces after ``head``, which is there once."""
    assert text.count(head) == 1, head
    start = text.index("{", text.index(head) + len(head) - 1) + 1
    depth, end = 1, start
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return text[start : end - 1]


def mapped(text: str, head: str) -> dict[str, str]:
    lines = [line.strip() for line in block(text, head).strip().splitlines()]
    assert lines[0] == 'default "";'
    return dict(re.fullmatch(r'"(.*)" (\S+);', line).groups() for line in lines[1:])  # type: ignore[union-attr, misc]


@settings(
    max_examples=tries(20),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(sites=names)
def test_nginx_takes_every_name_that_a_site_may_have(home: Path, sites: list[str]) -> None:
    assert "warn" not in takes_after_writing(home, sites)


def takes_after_writing(home: Path, sites: list[str]) -> str:
    front = front_of(home, {name: KEYS[n % len(KEYS)] for n, name in enumerate(sites)})
    write_nginx_config(front)
    return takes(front)


def test_names_that_are_words_of_nginx_are_names(home: Path) -> None:
    takes_after_writing(home, list(ODD))


def test_a_thousand_sites_are_no_trouble(home: Path) -> None:
    assert "warn" not in takes_after_writing(home, [f"site-{n}" for n in range(1000)])


@given(sites=names)
def test_a_name_is_let_in_with_its_own_key_alone(home: Path, sites: list[str]) -> None:
    members = {name: KEYS[n % len(KEYS)] for n, name in enumerate(sites)}
    text = written(front_of(home, members))
    nodes = mapped(text, 'map "$ssl_client_s_dn $http_flwr_public_key" $node_of {')
    known = mapped(text, "map $ssl_client_s_dn $site {")
    assert nodes == {f"CN={name} {key}": name for name, key in members.items()}
    assert known == {f"CN={name}": name for name in members}


def test_who_is_no_member_is_in_no_map(home: Path) -> None:
    text = written(front_of(home, {"a": KEYS[0]}))
    text = written(front_of(home, {"b": KEYS[1]}))
    assert KEYS[0] not in text
    assert '"CN=a' not in text


def test_without_members_nobody_has_a_name(home: Path) -> None:
    front = front_of(home, {})
    assert mapped(written(front), "map $ssl_client_s_dn $site {") == {}
    takes(front)


def test_the_configuration_is_this_users_alone_and_written_whole(home: Path) -> None:
    front = front_of(home, {"a": KEYS[0]})
    before = written(front)
    assert front.folder.stat().st_mode & 0o077 == 0
    inode = (front.folder / "nginx.conf").stat().st_ino
    assert written(front) == before
    assert (front.folder / "nginx.conf").stat().st_ino != inode  # moved there, not written over
    assert [path.name for path in front.folder.iterdir() if ".tmp" in path.name] == []


# --- what it says


@pytest.fixture
def server(home: Path) -> str:
    return block(written(front_of(home, {"a": KEYS[0]})), "server {")


def test_only_tls_and_certificates_that_are_not_revoked(server: str) -> None:
    listens = re.findall(r"listen (.*);", server)
    assert len(listens) == 1
    assert "ssl" in listens[0].split()
    assert "ssl_protocols TLSv1.2 TLSv1.3;" in server
    assert re.search(r"ssl_crl \S+/crl\.pem;", server)
    assert re.search(r"ssl_client_certificate \S+/ca\.pem;", server)
    # a session that is resumed would not be checked against the list
    assert "ssl_session_tickets off;" in server
    assert "ssl_session_cache none;" in server


@pytest.mark.parametrize("call", ["register-node", "unregister-node"])
def test_nobody_registers_itself(server: str, call: str) -> None:
    assert f"location = /v1/fleet/{call} {{ return 403; }}" in server


@pytest.mark.parametrize(
    ("place", "who"),
    [
        ("location /v1/fleet/ {", "$node_of"),
        (r"location ~ ^/fedgraft\.v1\.(Backbones|Membership)/ {", "$site"),
    ],
)
def test_members_alone_and_at_their_pace(server: str, place: str, who: str) -> None:
    inside = block(server, place)
    checks = [line.strip() for line in inside.strip().splitlines()][:2]
    assert checks == [
        "if ($ssl_client_verify != SUCCESS) { return 401; }",
        f'if ({who} = "") {{ return 403; }}',
    ]
    assert "limit_req zone=site" in inside
    assert "limit_conn open" in inside


def test_a_stranger_can_only_enrol_slowly_and_has_no_name(server: str) -> None:
    inside = block(server, "location = /fedgraft.v1.Enrolment/Enrol {")
    assert 'grpc_set_header x-site "";' in inside  # whatever the caller said
    assert "limit_req zone=stranger" in inside
    assert "client_max_body_size 64k;" in inside
    assert "grpc_set_header x-site $site;" in block(
        server, r"location ~ ^/fedgraft\.v1\.(Backbones|Membership)/ {"
    )


def test_all_else_ends_here(server: str) -> None:
    places = re.findall(r"location (?:= |~ )?(\S+) \{", server)
    assert sorted(places) == sorted(
        [
            "/v1/fleet/register-node",
            "/v1/fleet/unregister-node",
            "/v1/fleet/",
            "/fedgraft.v1.Enrolment/Enrol",
            r"^/fedgraft\.v1\.(Backbones|Membership)/",
            "/",
        ]
    )
    assert "location / { return 404; }" in server


def test_what_is_behind_is_local(home: Path) -> None:
    text = written(front_of(home, {}))
    assert "server 127.0.0.1:9092;" in text
    assert f"server unix:{home}/run/services.sock;" in text
    assert set(re.findall(r"(?:proxy|grpc)_pass \w+://(\w+);", text)) == {"superlink", "services"}


def test_the_command_keeps_nginx_in_its_folder(home: Path) -> None:
    front = replace(front_of(home, {}), listen="0.0.0.0:1")
    command = nginx_command(front, "/usr/sbin/nginx")
    assert command[:3] == ["/usr/sbin/nginx", "-p", str(front.folder)]
    assert "daemon off;" in command[-1]
    assert not Path(command[4]).is_absolute()
