"""The doctor: all well, then each thing wrong on purpose; nothing of the data is ever said."""

import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
import torch
from clinic import CANARY, Authority, Coordinator, Site

from fedgraft import common
from fedgraft.client import doctor_device
from fedgraft.client.doctor import CHECKS, Check, Finding, examine
from fedgraft.client.doctor_checks import _largest_backbone
from fedgraft.common.audit import Audit
from fedgraft.common.cli import main
from fedgraft.common.manifest import make_manifest

QUICK = tuple(check for check in CHECKS if check.name not in ("device", "training"))
BUILTIN = Path(common.__file__).parent / "builtin" / "glyph-vit"
NETWORK = ("name", "tcp", "tls", "coordinator", "clock", "latency")


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def coordinator() -> Coordinator:
    return Coordinator()


@pytest.fixture
def site(tmp_path: Path, authority: Authority, coordinator: Coordinator) -> Iterator[Site]:
    with coordinator.serve(authority) as port:
        yield Site(tmp_path, authority, f"localhost:{port}")


def look(site: Site, checks: tuple[Check, ...] = QUICK) -> dict[str, Finding]:
    """All findings by name; whatever they are, the canary is not in them."""
    found = {one.name: one for one in examine(site.file, checks)}
    assert CANARY not in repr(found)
    return found


def states(found: dict[str, Finding]) -> dict[str, str]:
    return {name: one.state for name, one in found.items() if one.state != "ok"}


def test_all_is_well(site: Site, coordinator: Coordinator) -> None:
    found = look(site, CHECKS)
    assert states(found) == {}
    assert list(found) == [check.name for check in CHECKS]
    assert set(coordinator.site_names) == {"a"}
    assert "3 steps of a LoRA adapter on cpu" in found["training"].what
    assert found["data"].what == "train 2 rows (text, label); test 1 rows (text, label)"
    assert "2 of 3 sites have joined" in found["roster"].what
    assert "Methods allowed: lora" in found["rules"].what


def test_nothing_is_changed(site: Site) -> None:
    def everything() -> dict[Path, tuple[int, int, bytes]]:
        found = {path: path.stat() for path in [site.folder, *site.folder.rglob("*")]}
        return {
            path: (facts.st_mode, facts.st_mtime_ns, path.read_bytes() if path.is_file() else b"")
            for path, facts in found.items()
        }

    before = everything()
    look(site, CHECKS)
    assert everything() == before


def test_a_check_that_breaks_stops_no_other_and_keeps_its_words_to_itself(site: Site) -> None:
    def breaks(patient: object) -> Finding:
        raise RuntimeError(CANARY)

    found = look(site, (Check("breaks", breaks), Check("after", breaks, ("breaks",)), *QUICK))
    assert found["breaks"].what == "could not be checked (RuntimeError)"
    assert states(found) == {"breaks": "fail", "after": "skipped"}


def test_without_a_site_file_only_proxies_are_looked_at(tmp_path: Path) -> None:
    found = list(examine(tmp_path / "site.toml"))
    assert found[0].state == "fail"
    assert {one.name for one in found if one.state == "ok"} == {"proxies"}
    assert all(one.state == "skipped" for one in found[1:] if one.name != "proxies")


def test_a_broken_policy_is_named_and_the_rest_goes_on(site: Site) -> None:
    (site.folder / "policy.toml").write_text("[model]\nmax_rnk = 3\n")
    found = look(site)
    assert states(found) == {"policy": "fail", "rules": "skipped"}
    assert "did you mean max_rank?" in found["policy"].hint


def test_a_site_that_has_not_joined_still_sees_what_is_here(site: Site) -> None:
    (site.state / "membership.json").unlink()
    found = look(site)
    assert found["membership"].state == "fail"
    assert found["tls"] == Finding("tls", "skipped", "needs tcp")
    assert found["data"].state == "ok"


def test_the_kits_name_and_the_sites_have_to_agree(site: Site) -> None:
    site.file.write_text(site.file.read_text().replace('name = "a"', 'name = "z"'))
    found = look(site)
    assert found["membership"].what == "site.toml says z, the kit was for a"
    assert found["membership"].hint == 'name = "a" in site.toml'


@pytest.mark.parametrize(
    ("days", "state", "what"),
    [(-1, "fail", "expired on"), (0.5, "warn", "expires in 12.0 hours"), (9, "fail", "valid from")],
)
def test_a_certificate_outside_its_time(site: Site, days: float, state: str, what: str) -> None:
    site.certify(days=days)
    found = look(site)
    assert found["certificate"].state == state
    assert what in found["certificate"].what
    if days < 1:
        assert "fedgraft provision renew a" in found["certificate"].hint
    if state == "fail":
        assert found["coordinator"].what == "needs certificate"


def test_a_certificate_of_somebody_else(site: Site) -> None:
    site.certify(name="b")
    assert look(site)["certificate"].what == "it is for b"
    other = Authority()
    site.authority = other
    site.certify()
    assert "not signed" in look(site)["certificate"].what


@pytest.mark.parametrize("name", ["identity.pem", "tls.key"])
def test_a_key_that_others_can_read(site: Site, name: str) -> None:
    (site.state / name).chmod(0o640)
    found = look(site)
    assert found["keys"].state == "fail"
    assert found["keys"].hint == f"chmod 600 {site.state / name}"
    assert "(0640)" in found["keys"].what
    (site.state / name).unlink()
    assert "is missing" in look(site)["keys"].what


@pytest.mark.parametrize(("mode", "state"), [(0o755, "warn"), (0o770, "fail"), (0o777, "fail")])
def test_a_state_folder_that_is_open(site: Site, mode: int, state: str) -> None:
    site.state.chmod(mode)
    found = look(site)
    assert states(found) == {"keys": state}
    assert found["keys"].hint == f"chmod 700 {site.state}"


def test_a_full_disk(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 400_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    found = look(site)
    assert states(found) == {"disk": "fail"}
    assert found["disk"].what == "0.4 GB free; a backbone needs 1.0 GB"
    monkeypatch.setattr("fedgraft.client.doctor_checks._largest_backbone", lambda state: 3 * 10**8)
    assert look(site)["disk"].state == "ok"  # once more what is here already
    monkeypatch.setattr("fedgraft.client.doctor_checks._largest_backbone", lambda state: 5 * 10**8)
    assert "another backbone of this size needs 0.5 GB" in look(site)["disk"].what


def test_the_largest_backbone_that_is_here(site: Site) -> None:
    manifest = make_manifest(BUILTIN, source="builtin")
    place = site.state / "backbones" / "manifests"
    place.mkdir(parents=True)
    (place / f"{manifest.digest}.json").write_bytes(manifest.to_json())
    assert _largest_backbone(site.state) == manifest.size > 0
    assert look(site)["disk"].state == "ok"


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
        import fedgraft.client.doctor_network as network

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
    assert states(found) == {"coordinator": "fail", "clock": "skipped", "latency": "skipped"}


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
    monkeypatch.setattr("fedgraft.client.doctor_network.PATIENCE", 1.0)
    found = look(site)
    assert [found[name].state for name in NETWORK[:4]] == [*["skipped"] * 3, "fail"]


def test_a_roster_with_another_key_for_us(site: Site) -> None:
    text = (site.state / "roster.toml").read_text()
    own = text.split('a = "')[1][:64]
    (site.state / "roster.toml").write_text(text.replace(own, "cd" * 32))
    assert states(look(site)) == {"roster": "fail"}


def test_an_audit_that_was_changed(site: Site) -> None:
    path = site.state / "audit.jsonl"
    audit = Audit(path)
    audit.append({"direction": "in"})
    audit.append({"direction": "out"})
    assert look(site)["audit"].what.startswith("2 lines")
    path.write_bytes(path.read_bytes().replace(b'"in"', b'"no"'))
    assert states(look(site)) == {"audit": "fail"}


def test_a_gpu_that_is_not_there(site: Site) -> None:
    site.file.write_text(site.file.read_text().replace('"cpu"', '"mps"'))
    found = look(site, CHECKS)
    assert found["device"].what == "device mps is not available here"
    assert found["training"].what == "needs device"


def test_a_gpu_and_what_it_can_do(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.file.write_text(site.file.read_text().replace('"cpu"', '"auto"'))
    facts = SimpleNamespace(name="Fake T4", total_memory=16e9)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: facts)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (4e9, 16e9))
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    monkeypatch.setattr(doctor_device, "DRIVER", site.folder / "none")

    def full(chosen: object) -> tuple[bool, int]:
        raise torch.OutOfMemoryError(CANARY)

    monkeypatch.setattr(doctor_device, "_train", full)
    found = look(site, CHECKS)
    said = "Fake T4, 4.0 of 16.0 GB free, driver unknown, no bf16, torch "
    assert found["device"].what.startswith(said)
    assert found["training"].what == "cuda has no memory left"


def test_a_driver_that_torch_cannot_use(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.file.write_text(site.file.read_text().replace('"cpu"', '"auto"'))
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n")
    monkeypatch.setattr(doctor_device, "DRIVER", version)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = {one.name: one for one in examine(site.file, CHECKS)}
    assert found["device"].state == "warn"
    assert "NVIDIA driver 535.104.05 is here" in found["device"].what
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Rel\n")
    assert doctor_device._driver() == "550.54.15"


def run(site: Site, *more: str) -> int:
    """The exit code of the real command."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        words = ["fedgraft", "site", "doctor", "--site", str(site.file), *more]
        patch.setattr(sys, "argv", words)
        main()
    assert isinstance(left.value.code, int)
    return left.value.code


def test_the_command_says_a_line_a_check_and_then_hints(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(site) == 0
    (site.state / "tls.key").chmod(0o644)
    capsys.readouterr()
    assert run(site) == 1
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [line.split()[1] for line in lines[: len(CHECKS)]] == [one.name for one in CHECKS]
    assert f"  keys: chmod 600 {site.state / 'tls.key'}" in lines
    assert CANARY not in said.out + said.err
    assert "PRIVATE" not in said.out + said.err


def test_json_is_one_object_and_warnings_do_not_fail(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.certify(days=0.5)
    assert run(site, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["healthy"] is True
    assert {one["name"]: one["state"] for one in said["findings"]}["certificate"] == "warn"
    (site.folder / "train.csv").unlink()
    assert run(site, "--json") == 1
    said = json.loads(capsys.readouterr().out)
    assert said["healthy"] is False
    assert CANARY not in json.dumps(said)
