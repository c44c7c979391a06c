"""What a site takes from the coordinator's roster, and what no coordinator can slip in."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.commands import command
from support.memberships import NAMES, Coordinator, open_federation, write_plan

from fedgraft.client.membership.identity import load_identity
from fedgraft.client.membership.roster import (
    Trust,
    accept,
    admit,
    keep_roster,
    refresh_roster,
    roster_fingerprint,
)
from fedgraft.common.errors import FedgraftError, InputError
from fedgraft.common.federation.audit_log import read
from fedgraft.common.federation.federation_file import (
    Federation,
    Floor,
    dump_federation,
    load_federation,
)
from fedgraft.common.files import hash_file
from fedgraft.server.enrollment.provision import found, renew_kit, revoke

A, B, C = NAMES
KEY = {name: f"{number:02x}" * 32 for number, name in enumerate([*NAMES, "late"], 1)}
OTHER = "ee" * 32


def roster(sites: dict[str, str], **floor: int) -> bytes:
    return dump_federation(Federation(secure_aggregation=Floor(**floor), sites=sites)).encode()


def trust(known: dict[str, str]) -> Trust:
    return Trust(A, KEY[A], NAMES, known, Floor())


# --- what is accepted


def test_first_keys_are_taken_and_changed_ones_are_not() -> None:
    taken, strangers = accept(roster({A: KEY[A], B: KEY[B]}), trust({}))
    assert (dict(taken.sites), strangers) == ({A: KEY[A], B: KEY[B]}, [])
    with pytest.raises(InputError, match=rf"roster-changed \(the key of {B}\)") as error:
        accept(roster({A: KEY[A], B: OTHER}), trust(dict(taken.sites)))
    assert "ask that site, not the coordinator" in error.value.hint


@pytest.mark.parametrize("sites", [{A: OTHER}, {B: KEY[B]}, {A: OTHER, B: KEY[A]}])
def test_a_roster_without_this_sites_own_key(sites: dict[str, str]) -> None:
    with pytest.raises(InputError, match="another key for this site, or none"):
        accept(roster(sites), trust({}))


def test_the_floor_stays() -> None:
    with pytest.raises(InputError, match="floor-changed"):
        accept(roster({A: KEY[A]}, min_cohort=5), trust({}))


@pytest.mark.parametrize("raw", [b"", b"\xff\xfe", b"[sites", b"[sites]\n", b"x = 1\n"])
def test_what_is_no_roster(raw: bytes) -> None:
    with pytest.raises(InputError, match="coordinator's roster"):
        accept(raw, trust({}))


keys = st.sampled_from(["11" * 32, "22" * 32, "33" * 32, "44" * 32])


@given(rosters=st.lists(st.dictionaries(st.sampled_from([B, C, "late"]), keys, max_size=3)))
def test_whatever_a_coordinator_sends_in_whatever_order_a_key_never_changes(
    rosters: list[dict[str, str]],
) -> None:
    """Also not by leaving a site out for a while; nor is one taken whom the kit does not name."""
    first: dict[str, str] = {}
    for sites in rosters:
        if len({KEY[A], *sites.values()}) <= len(sites):
            continue  # two sites with one key: no roster at all
        try:
            taken, strangers = accept(roster({A: KEY[A], **sites}), trust(dict(first)))
        except InputError:
            continue
        assert set(strangers) == {"late"} & set(sites)
        for name, key in taken.sites.items():
            assert name in NAMES
            assert first.setdefault(name, key) == key


def test_the_fingerprint_is_of_the_file_and_the_same_whatever_the_order(tmp_path: Path) -> None:
    one = Federation(sites={A: KEY[A], B: KEY[B]})
    other = Federation(sites={B: KEY[B], A: KEY[A]})
    assert roster_fingerprint(one) == roster_fingerprint(other)
    assert roster_fingerprint(one) != roster_fingerprint(Federation(sites={A: KEY[A], B: OTHER}))
    assert roster_fingerprint(one) != roster_fingerprint(
        Federation(sites=one.sites, secure_aggregation=Floor(colluders=2, min_cohort=4))
    )
    keep_roster(tmp_path, other)
    assert hash_file(tmp_path / "roster.toml") == roster_fingerprint(one)


# --- against a coordinator


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    with open_federation(tmp_path) as running:
        running.join(A)
        yield running


def sites_of(state: Path) -> dict[str, str]:
    return dict(load_federation(state / "roster.toml").sites)


def own_key(coordinator: Coordinator, name: str) -> str:
    return load_identity(coordinator.state(name)).public.hex()


def test_sites_come_and_go(coordinator: Coordinator) -> None:
    state = coordinator.state(A)
    coordinator.join(B)
    expected = {name: own_key(coordinator, name) for name in (A, B)}
    assert dict(refresh_roster(state).sites) == sites_of(state) == expected
    coordinator.join(C)
    assert list(refresh_roster(state).sites) == [A, B, C]
    revoke(coordinator.home, B)
    assert list(refresh_roster(state).sites) == [A, C]
    assert B in json.loads((state / "known.json").read_text())


def test_all_sites_have_the_same_fingerprint_to_compare(coordinator: Coordinator) -> None:
    for name in (C, B):
        coordinator.join(name)
    said = {roster_fingerprint(refresh_roster(coordinator.state(name))) for name in NAMES}
    assert len(said) == 1


def test_a_site_with_new_keys_is_refused_until_a_person_agrees(coordinator: Coordinator) -> None:
    """Also if the coordinator leaves it out of the roster in between."""
    state = coordinator.state(A)
    coordinator.join(B)
    refresh_roster(state)
    renew_kit(coordinator.home, B, coordinator.kits)
    assert list(refresh_roster(state).sites) == [A]
    elsewhere = coordinator.folder / "elsewhere"
    coordinator.join(B, elsewhere)
    before = (state / "roster.toml").read_bytes()
    with pytest.raises(InputError, match="roster-changed"):
        refresh_roster(state)
    assert (state / "roster.toml").read_bytes() == before
    admit(state, B, OTHER)
    with pytest.raises(InputError, match="roster-changed"):
        refresh_roster(state)
    key = load_identity(elsewhere).public.hex()
    admit(state, B, key)
    assert refresh_roster(state).sites[B] == key


def test_a_site_that_comes_later_waits_for_a_persons_word(coordinator: Coordinator) -> None:
    state = coordinator.state(A)
    plan = write_plan(coordinator.folder, [*NAMES, "late"], port=coordinator.port)
    found(plan, coordinator.home, coordinator.kits)
    coordinator.join("late")
    with pytest.raises(InputError, match=r"site-unknown \(late\)") as error:
        refresh_roster(state)
    assert "fedgraft site admit" in error.value.hint
    assert list(sites_of(state)) == [A]
    admit(state, "late")
    assert list(refresh_roster(state).sites) == [A, "late"]
    admit(state, "late")  # again: the next key counts as the first
    assert "late" not in json.loads((state / "known.json").read_text())


def test_a_persons_word_is_in_the_audit_and_nothing_is_done_without(
    coordinator: Coordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    state = coordinator.state(A)
    site = state.parent / "site.toml"
    site.write_text(f'name = "{A}"\n[data]\ntrain = "t.csv"\n')
    where = ("--site", str(site))
    assert command(capsys, "site", "admit", "late", "--key", OTHER, *where)[0] == 0
    (line,) = read(state / "audit.jsonl")
    assert [line[key] for key in ("stage", "decision", "site", "key")] == [
        *("admit", "admitted", "late", OTHER)
    ]
    assert "admit   admitted late" in command(capsys, "site", "audit", *where)[1]
    table = command(capsys, "site", "audit", "--export", "csv", *where)[1].splitlines()
    assert dict(zip(table[0].split(","), table[1].split(","), strict=True))["key"] == OTHER
    for name, key in ((A, ""), ("../x", ""), (B, "no key")):  # what is refused is no decision
        assert command(capsys, "site", "admit", name, "--key", key, *where)[0] == 2
    assert len(list(read(state / "audit.jsonl"))) == 1
    before = {path.name: path.read_bytes() for path in state.iterdir() if path.is_file()}
    broken = before["audit.jsonl"].replace(b"late", b"lost")
    (state / "audit.jsonl").write_bytes(broken)
    assert command(capsys, "site", "admit", B, *where)[0] == 1
    after = {path.name: path.read_bytes() for path in state.iterdir() if path.is_file()}
    assert after == {**before, "audit.jsonl": broken}


def test_a_site_that_is_out_is_told_so(coordinator: Coordinator) -> None:
    before = sites_of(coordinator.state(A))
    revoke(coordinator.home, A)
    with pytest.raises(FedgraftError, match="site-revoked"):
        refresh_roster(coordinator.state(A))
    assert sites_of(coordinator.state(A)) == before


@pytest.mark.parametrize("damage", ["", "[]", '{"hospital-b": 7}', '{"hospital-b": "x"}'])
def test_without_what_it_knew_a_site_trusts_nobody_anew(
    coordinator: Coordinator, damage: str
) -> None:
    (coordinator.state(A) / "known.json").write_text(damage)
    with pytest.raises(InputError, match=r"known\.json is damaged"):
        refresh_roster(coordinator.state(A))


def test_a_site_of_before_goes_on_from_its_roster(coordinator: Coordinator) -> None:
    state = coordinator.state(A)
    coordinator.join(B)
    refresh_roster(state)
    (state / "known.json").unlink()
    renew_kit(coordinator.home, B, coordinator.kits)
    coordinator.join(B, coordinator.folder / "elsewhere")
    with pytest.raises(InputError, match="roster-changed"):
        refresh_roster(state)


def test_what_did_not_change_is_not_written(coordinator: Coordinator) -> None:
    state = coordinator.state(A)
    refresh_roster(state)
    times = [(state / name).stat().st_mtime_ns for name in ("roster.toml", "known.json")]
    refresh_roster(state)
    assert [(state / n).stat().st_mtime_ns for n in ("roster.toml", "known.json")] == times
