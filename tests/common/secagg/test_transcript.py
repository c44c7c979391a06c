"""Transcript: an injective encoding, a context that everything enters, strict statements."""

import ast
import dataclasses
import hashlib
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from secagg import reference as slow
from secagg.federation import MODEL, Federation, coding_for, parameters_for

import fedgraft.common.secagg as package
from fedgraft.common.secagg import transcript as t
from fedgraft.common.secagg.errors import ParameterError, PolicyRefused, StatementError
from fedgraft.common.secagg.keys import Identity
from fedgraft.common.secagg.statements import Advertisement, Confirmation, Survivors

field = st.one_of(
    st.binary(max_size=9), st.text(max_size=9), st.integers(-(2**63), 2**63 - 1), st.floats()
)


SIGNED = (b"1", b"2", b"3")


def typed(fields: list[Any]) -> list[tuple[str, Any]]:
    return [(type(v).__name__, struct.pack(">d", v) if type(v) is float else v) for v in fields]


@given(st.lists(field, max_size=4), st.lists(field, max_size=4))
def test_different_fields_never_encode_alike(one: list[Any], other: list[Any]) -> None:
    assert (t.encode(*one) == t.encode(*other)) == (typed(one) == typed(other))
    assert t.encode(*one) == slow.encode(*one)


@pytest.mark.parametrize(
    ("one", "other"),
    [((b"ab", b"c"), (b"a", b"bc")), ((b"a",), ("a",)), ((b"", b""), (b"",)), ((), (b"",))],
)
def test_what_concatenation_would_confuse(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert t.encode(*one) != t.encode(*other)
    assert t.encode(t.encode(*one)) != t.encode(*one)


@pytest.mark.parametrize("bad", [None, True, 2**63, -(2**63) - 1, (1,)])
def test_other_fields_cannot_be_encoded(bad: Any) -> None:
    with pytest.raises(ParameterError):
        t.encode(bad)


def test_the_model_hash_covers_adapter_and_settings() -> None:
    adapter = np.arange(4, dtype=np.float32)
    seen = {
        t.hash_model(t.hash_adapter(adapter), b"a"),
        t.hash_model(t.hash_adapter(adapter), b"b"),
        t.hash_model(t.hash_adapter(adapter + 1), b"a"),
        t.hash_model(t.hash_adapter(adapter[:3]), b"a"),
        t.hash_model(t.hash_adapter(adapter[:0]), b""),
    }
    assert len(seen) == 5
    assert t.hash_model(t.hash_adapter(adapter), b"a") == t.hash_model(
        t.hash_adapter(np.arange(8, dtype="f4")[:4]), b"a"
    )


CHANGES: dict[str, dict[str, Any]] = {
    "session": {"session": bytes(16)},
    "cohort": {"cohort": (0, 1, 2, 3, 4, 5, 7)},
    "layout": {"layout": bytes(32)},
    "length": {"length": 6},
    "colluders": {"colluders": 2},
    "dropouts": {"dropouts": 1},
    "clip": {"coding": coding_for(7, clip=0.25)},
    "ring": {"coding": coding_for(7, ring_bits=32)},
    "value bits": {"coding": coding_for(7, value_bits=16)},
    "weight": {"coding": coding_for(7, max_weight=999)},
    "metric": {"coding": coding_for(7, metric_limit=1.0)},
    "parties": {"coding": coding_for(8)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_parameter_enters_the_context(change: dict[str, Any]) -> None:
    roster, policy = Federation(8).roster, t.Policy(1, 3, 16, 1.0)
    plain = t.context_hash(parameters_for(7, 5), roster, policy)
    assert t.context_hash(parameters_for(7, 5), roster, policy) == plain
    assert t.context_hash(parameters_for(7, 5, **change), roster, policy) != plain


@pytest.mark.parametrize(
    "policy", [(2, 3, 16, 1.0), (1, 4, 16, 1.0), (1, 3, 24, 1.0), (1, 3, 16, 0.9)]
)
def test_roster_and_policy_enter_the_context(policy: tuple[int, int, int, float]) -> None:
    roster, parameters = Federation(8).roster, parameters_for(7, 5)
    plain = t.context_hash(parameters, roster, t.Policy(1, 3, 16, 1.0))
    assert t.context_hash(parameters, roster, t.Policy(*policy)) != plain
    other = t.Roster(tuple(reversed(roster.keys)))
    assert t.context_hash(parameters, other, t.Policy(1, 3, 16, 1.0)) != plain


@pytest.mark.parametrize(
    ("policy", "cohort"),
    [
        (t.Policy(2, 3, 16, 1.0), range(4)),
        (t.Policy(1, 5, 16, 1.0), range(4)),
        (t.Policy(1, 3, 32, 1.0), range(4)),
        (t.Policy(1, 3, 16, 0.4), range(4)),
        (t.Policy(1, 3, 16, 1.0), (0, 1, 2, 4)),
    ],
)
def test_parameters_below_the_policy_are_refused(policy: t.Policy, cohort: Any) -> None:
    roster = Federation(4).roster
    parameters = parameters_for(4, 5, cohort=tuple(cohort))
    t.check_policy(parameters_for(4, 5), roster, t.Policy(1, 4, 24, 0.5))
    with pytest.raises(PolicyRefused):
        t.check_policy(parameters, roster, policy)


@pytest.mark.parametrize(
    "changes",
    [
        {"session": b"short"},
        {"session": "a" * 16},
        {"layout": b"short"},
        {"layout": "a" * 32},
        {"length": -1},
        {"cohort": (0, 1, 1, 2)},
        {"cohort": (2, 1, 0)},
        {"cohort": [0, 1, 2]},
        {"cohort": (-1, 1, 2)},
        {"cohort": (0, 1, 65535)},
        {"cohort": (0, 1, 2.0)},
        {"cohort": (0, 1)},
        {"cohort": ()},
        {"colluders": 0},
        {"coding": coding_for(3)},
    ],
)
def test_parameters_that_cannot_work_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        parameters_for(4, 5, **changes)


@pytest.mark.parametrize(
    "keys", [(), (bytes(32), bytes(32)), (bytes(31),), ("a" * 32,), (bytearray(32),)]
)
def test_rosters_that_are_none_are_refused(keys: Any) -> None:
    with pytest.raises((ParameterError, TypeError)):
        t.Roster(keys)


FRAME = t.Frame(bytes(32), 3, MODEL)


def test_a_signature_holds_for_one_kind_frame_sender_and_body() -> None:
    frames = [
        FRAME,
        t.Frame(b"\1" * 32, 3, MODEL),
        t.Frame(bytes(32), 4, MODEL),
        t.Frame(bytes(32), 3, bytes(32)),
    ]
    seen = {t.statement(frame, "keys", 1, b"") for frame in frames}
    seen |= {t.statement(FRAME, *rest) for rest in (("seed", 1, b""), ("keys", 2, b""))}
    seen.add(t.statement(FRAME, "keys", 1, b"x"))
    assert len(seen) == 7


def advertise(site: int, **changes: Any) -> Advertisement:
    keys = (hashlib.sha256(f"{kind}{site}".encode()).digest() for kind in "msc")
    plain = Advertisement(site, next(keys), next(keys), next(keys), b"")
    plain = dataclasses.replace(plain, **changes)
    identity = Federation(4).identities[site % 4]
    signature = t.sign(identity, FRAME, "keys", site, t.advertisement_body(plain))
    return dataclasses.replace(plain, signature=changes.get("signature", signature))


def check(*advertisements: Advertisement) -> dict[int, Advertisement]:
    return t.check_advertisements(advertisements, FRAME, Federation(4).roster, (0, 1, 2, 3))


def test_advertisements_are_checked_each_and_together() -> None:
    good = [advertise(site) for site in (2, 0, 1)]
    assert list(check(*good)) == [0, 1, 2]
    first = good[0]
    for bad in (
        advertise(0, mask_key=bytes(31)),
        dataclasses.replace(advertise(0), mask_key=bytearray(32)),  # type: ignore[arg-type]
        advertise(0, seal_key=b""),
        advertise(0, commitment=bytes(33)),
        advertise(0, signature=bytes(63)),
        advertise(0, signature=bytes(64)),
        dataclasses.replace(advertise(0), commitment=bytes(32)),
        advertise(0, mask_key=first.mask_key),
        advertise(0, seal_key=first.mask_key),
        advertise(0, mask_key=bytes(32), seal_key=bytes(32)),
    ):
        with pytest.raises(StatementError) as caught:
            check(first, bad)
        assert caught.value.culprits == (0,)
    with pytest.raises(StatementError) as caught:
        check(first, first)
    assert caught.value.culprits == (2,)
    for site in (7, -1, "0", True):
        with pytest.raises(StatementError):
            check(dataclasses.replace(advertise(0), site=site))  # type: ignore[arg-type]


def test_the_hash_of_advertisements_covers_them_all_in_any_order() -> None:
    one, other = advertise(0), advertise(1)
    plain = t.hash_advertisements(FRAME, {0: one, 1: other})
    assert plain == t.hash_advertisements(FRAME, {1: other, 0: one})
    changed = dataclasses.replace(other, commitment=bytes(32))
    later = dataclasses.replace(FRAME, round=4)
    assert plain != t.hash_advertisements(FRAME, {0: one, 1: changed})
    assert plain != t.hash_advertisements(FRAME, {0: one})
    assert plain != t.hash_advertisements(later, {0: one, 1: other})


def test_a_pair_agrees_on_its_info_and_nobody_else() -> None:
    found = {site: advertise(site).mask_key for site in range(3)}
    assert t.pair_info(FRAME, found, 0, 2) == t.pair_info(FRAME, found, 2, 0)
    assert t.pair_info(FRAME, found, 0, 2) != t.pair_info(FRAME, found, 1, 2)
    ways = {t.seal_info(FRAME, MODEL, *way) for way in ((0, 1), (1, 0), (0, 2))}
    assert len(ways) == 3
    assert t.seed_info(FRAME, 0) != t.seed_info(FRAME, 1)


@pytest.mark.parametrize(
    "survivors",
    [
        Survivors((0, 1, 2), (0, 1, 3), SIGNED),
        Survivors((0, 1, 9), (0, 1), SIGNED[:2]),
        Survivors((1, 0, 2), (0, 1), SIGNED[:2]),
        Survivors((0, 1, 2), (0, 1), SIGNED),
        Survivors((0, 1, 2), (0, 0), SIGNED[:2]),
        Survivors((0, 1, 2), (0, 1.0), SIGNED[:2]),  # type: ignore[arg-type]
        Survivors((0, 1, 2), [0, 1], SIGNED[:2]),  # type: ignore[arg-type]
    ],
)
def test_survivors_that_are_no_chain_are_refused(survivors: Survivors) -> None:
    t.check_survivors(Survivors((0, 1, 2), (0, 1), SIGNED[:2]), range(4))
    with pytest.raises(StatementError):
        t.check_survivors(survivors, range(4))


def test_a_confirmation_is_a_survivors_signature_over_the_survivors() -> None:
    federation = Federation(4)
    survivors = Survivors((0, 1, 2), (0, 1), SIGNED[:2])
    agreed = t.hash_survivors(MODEL, survivors)
    other = t.hash_survivors(MODEL, Survivors((0, 1), (0, 1), SIGNED[:2]))
    assert agreed != other

    def confirm(site: Any, over: bytes, key: Identity, kind: str = "confirm") -> None:
        signature = t.sign(key, FRAME, kind, 1 if type(site) is str else int(site), over)
        t.check_confirmation(
            Confirmation(site, signature), FRAME, federation.roster, survivors, agreed
        )

    keys = federation.identities
    confirm(1, agreed, keys[1])
    for arguments in (
        (1, agreed, keys[2]),
        (1, other, keys[1]),
        (1, agreed, keys[1], "keys"),
        (2, agreed, keys[2]),
        ("1", agreed, keys[1]),
        (True, agreed, keys[1]),
    ):
        with pytest.raises(StatementError):
            confirm(*arguments)
    with pytest.raises(StatementError):
        t.check_confirmation(Confirmation(1, b""), FRAME, federation.roster, survivors, agreed)


def test_the_core_imports_numpy_cryptography_and_no_global_randomness() -> None:
    import sys

    allowed = {*sys.stdlib_module_names, "numpy", "cryptography"} - {"random", "socket", "logging"}
    for path in Path(next(iter(package.__path__))).glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                ours = name.startswith("fedgraft.common.secagg")
                assert ours or name.split(".")[0] in allowed, (path.name, name)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "np.random":
                assert node.attr in ("Generator", "PCG64"), (path.name, node.attr)


def test_floats_in_the_context_are_exact() -> None:
    assert t.encode(0.1) != t.encode(math.nextafter(0.1, 1))
