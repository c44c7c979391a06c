"""What a site has begun or agreed to is so for ever, whatever happens to the site between."""

import os
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgraft.client.secagg.stage_log import AgreedSums, StageLog
from fedgraft.common.secagg.errors import StageError
from fedgraft.common.secagg.statements import SecAggStage

ORDER = [
    SecAggStage.KEYS,
    SecAggStage.SHARES,
    SecAggStage.TRAIN,
    SecAggStage.CONFIRM,
    SecAggStage.UNMASK,
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the claims of a session will be; its folder is not there yet."""
    return tmp_path / "state" / "session" / "claims"


def granted(path: Path, number: int, stage: SecAggStage) -> bool:
    """Whether the claim is granted by a site that knows nothing but its disk."""
    try:
        StageLog(path)(number, stage)
    except StageError:
        return False
    return True


def left_behind(path: Path, text: bytes) -> Path:
    path.parent.mkdir(parents=True)
    path.write_bytes(text)
    return path


def test_the_stages_of_a_round_are_claimed_in_order(path: Path) -> None:
    for number in (1, 2):
        assert [granted(path, number, stage) for stage in ORDER] == [True] * 5


@pytest.mark.parametrize("stage", ORDER)
def test_no_stage_is_claimed_twice(path: Path, stage: SecAggStage) -> None:
    claims = StageLog(path)
    claims(4, stage)
    for site in (claims, StageLog(path)):  # in the same process, and after a restart
        with pytest.raises(StageError, match="served before"):
            site(4, stage)


def test_a_refusal_claims_nothing_and_repeats_itself(path: Path) -> None:
    StageLog(path)(3, SecAggStage.TRAIN)
    before = path.read_bytes()
    assert not granted(path, 3, SecAggStage.KEYS)
    assert not granted(path, 3, SecAggStage.KEYS)
    assert path.read_bytes() == before
    assert granted(path, 3, SecAggStage.CONFIRM)


@pytest.mark.parametrize("later", ORDER[1:])
def test_a_stage_is_not_claimed_after_a_later_one(path: Path, later: SecAggStage) -> None:
    assert granted(path, 2, later)
    assert not any(granted(path, 2, stage) for stage in ORDER if stage <= later)
    assert all(granted(path, 2, stage) for stage in ORDER if stage > later)


def test_stages_may_be_left_out(path: Path) -> None:
    assert granted(path, 1, SecAggStage.KEYS)
    assert granted(path, 1, SecAggStage.UNMASK)


def test_a_later_round_begins_with_the_first_stage_again(path: Path) -> None:
    assert granted(path, 1, SecAggStage.UNMASK)
    assert granted(path, 9, SecAggStage.KEYS)
    assert granted(path, 9, SecAggStage.SHARES)


def test_nothing_of_an_earlier_round_is_claimed_any_more(path: Path) -> None:
    assert granted(path, 10, SecAggStage.KEYS)  # as a number: as text "9" would be later
    assert not any(granted(path, number, stage) for number in (1, 9) for stage in ORDER)


@pytest.mark.parametrize("number", [-1, -(2**63)])
def test_a_round_below_zero_is_never_claimed(path: Path, number: int) -> None:
    assert not granted(path, number, SecAggStage.UNMASK)
    assert granted(path, 1, SecAggStage.KEYS)


def test_the_largest_round_ends_the_session(path: Path) -> None:
    assert granted(path, 2**63 - 1, SecAggStage.UNMASK)
    assert not granted(path, 2**63 - 1, SecAggStage.UNMASK)


def test_sessions_do_not_know_of_each_other(path: Path) -> None:
    assert granted(path, 5, SecAggStage.KEYS)
    assert granted(path.parent.parent / "another" / "claims", 5, SecAggStage.KEYS)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from(ORDER)), max_size=12))
def test_what_is_granted_only_ever_grows(
    tmp_path_factory: pytest.TempPathFactory, asked: list[tuple[int, SecAggStage]]
) -> None:
    path = tmp_path_factory.mktemp("claims") / "claims"
    latest = (0, 0)
    for number, stage in asked:
        assert granted(path, number, stage) == ((number, stage) > latest)
        latest = max(latest, (number, stage.value))


# What a crash or a power cut leaves behind


@pytest.mark.parametrize("torn", [b"2 SHA", b"2 ", b"2", b"\0\0\0\0", b"2 SHARES"])
def test_a_line_that_was_torn_neither_counts_nor_swallows_the_next(path: Path, torn: bytes) -> None:
    left_behind(path, b"1 UNMASK\n2 KEYS\n" + torn)
    assert not granted(path, 2, SecAggStage.KEYS)
    assert granted(path, 2, SecAggStage.SHARES)  # the torn one was never answered
    assert not granted(path, 2, SecAggStage.SHARES)
    assert granted(path, 2, SecAggStage.TRAIN)


def test_a_torn_line_alone_in_the_file_is_no_claim(path: Path) -> None:
    left_behind(path, b"1 KE")
    assert granted(path, 1, SecAggStage.KEYS)
    assert not granted(path, 1, SecAggStage.KEYS)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\n\n",
        b"99\n",
        b"99 \n",
        b" KEYS\n",
        b"99 keys\n",
        b"99 NOTHING\n",
        b"99 KEYS more\n",
        b"-99 UNMASK\n",
        b"9x9 UNMASK\n",
        b"\xff\xfe \xff\n",
        b"99 \xff\n",
        b"\0" * 64 + b"\n",
    ],
)
def test_lines_that_are_no_claims_are_passed_over(path: Path, garbage: bytes) -> None:
    left_behind(path, garbage + b"5 SHARES\n" + garbage)
    assert not granted(path, 5, SecAggStage.SHARES)
    assert granted(path, 5, SecAggStage.TRAIN)
    assert not granted(path, 5, SecAggStage.TRAIN)


def test_the_latest_claim_counts_wherever_it_stands(path: Path) -> None:
    left_behind(path, b"1 KEYS\n7 CONFIRM\n3 KEYS\n")
    assert not granted(path, 7, SecAggStage.CONFIRM)
    assert granted(path, 7, SecAggStage.UNMASK)


def test_a_claim_is_on_the_disk_when_it_is_granted(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[int, bytes]] = []  # what, and the claims as they were then
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        fsync(descriptor)
        synced.append((os.fstat(descriptor).st_ino, path.read_bytes()))

    monkeypatch.setattr(os, "fsync", watched)
    StageLog(path)(1, SecAggStage.KEYS)
    file, session, state = (place.stat().st_ino for place in (path, *path.parents[:2]))
    # The file, its entry in the session's folder, and the entry of that folder.
    assert {(place, b"1 KEYS\n") for place in (file, session, state)} <= set(synced)
    synced.clear()
    StageLog(path)(1, SecAggStage.SHARES)
    assert (file, b"1 KEYS\n1 SHARES\n") in synced


def test_a_claim_that_cannot_be_written_is_not_granted(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        StageLog(path)(1, SecAggStage.KEYS)


def test_the_folder_of_a_session_is_the_sites_own(path: Path) -> None:
    assert granted(path, 1, SecAggStage.KEYS)
    assert path.parent.stat().st_mode & 0o777 == 0o700


# Many at once


def test_of_many_processes_that_claim_a_stage_exactly_one_wins(path: Path) -> None:
    """As when a coordinator sends one request many times, and each copy wakes a process."""
    rounds, processes = 40, 4
    with get_context("spawn").Pool(processes) as pool:
        for number in range(1, rounds + 1):
            tries = [
                pool.apply_async(StageLog(path), (number, SecAggStage.KEYS))
                for _ in range(2 * processes)
            ]
            wins = 0
            for each in tries:
                try:
                    each.get(timeout=60)
                    wins += 1
                except StageError:
                    pass
            assert wins == 1
    assert path.read_text() == "".join(f"{number} KEYS\n" for number in range(1, rounds + 1))


# Sums that were agreed to

WORK, SUM, OTHER = b"w" * 32, b"s" * 32, b"o" * 32


def pledged(path: Path, work: bytes, total: bytes) -> bool:
    """Whether a site that knows nothing but its disk agrees to this sum."""
    try:
        AgreedSums(path)(work, total)
    except StageError:
        return False
    return True


def test_a_sum_once_agreed_to_may_be_opened_again_but_no_other(path: Path) -> None:
    pledges = AgreedSums(path)
    pledges(WORK, SUM)
    for again in (pledges, AgreedSums(path)):
        again(WORK, SUM)
        with pytest.raises(StageError, match="over other sites"):
            again(WORK, OTHER)
        again(WORK, SUM)  # a refusal changes nothing
    assert path.read_text() == f"{WORK.hex()} {SUM.hex()}\n"


def test_other_work_is_summed_over_whom_it_likes(path: Path) -> None:
    works = [bytes([number]) * 32 for number in range(5)]
    assert all(pledged(path, work, SUM) for work in works)
    assert not any(pledged(path, work, OTHER) for work in works)
    assert pledged(path, WORK, OTHER)


@pytest.mark.parametrize(
    "left",
    [
        f"{WORK.hex()} {SUM.hex()}"[:-1],
        f"{WORK.hex()} {SUM.hex()}",
        f"{WORK.hex()} ",
        f"{WORK.hex()}",
        f"{WORK.hex()}"[:9],
        "\0\0\0",
    ],
)
def test_a_pledge_that_was_torn_does_not_stand_in_the_way_of_the_same_sum(
    path: Path, left: str
) -> None:
    left_behind(path, left.encode())
    assert pledged(path, WORK, SUM)
    assert pledged(path, WORK, SUM)
    assert not pledged(path, WORK, OTHER)


def test_garbage_among_pledges_is_passed_over(path: Path) -> None:
    garbage = b"\n\xff\xfe\n" + WORK[:5].hex().encode() + b"\n\0\0\n"
    left_behind(path, garbage + f"{WORK.hex()} {SUM.hex()}\n".encode() + garbage)
    assert pledged(path, WORK, SUM)
    assert not pledged(path, WORK, OTHER)


def test_a_pledge_is_on_the_disk_when_it_is_given(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[int, bytes]] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        fsync(descriptor)
        synced.append((os.fstat(descriptor).st_ino, path.read_bytes()))

    monkeypatch.setattr(os, "fsync", watched)
    AgreedSums(path)(WORK, SUM)
    line = f"{WORK.hex()} {SUM.hex()}\n".encode()
    places = {place.stat().st_ino for place in (path, *path.parents[:2])}
    assert {(place, line) for place in places} <= set(synced)


def test_of_many_processes_that_agree_to_different_sums_one_sum_wins(path: Path) -> None:
    processes = 4
    sums = [bytes([number]) * 32 for number in range(2 * processes)]
    with get_context("spawn").Pool(processes) as pool:
        for number in range(20):
            work, won = bytes([number]) * 32, set()
            tries = [(total, pool.apply_async(AgreedSums(path), (work, total))) for total in sums]
            for total, each in tries:
                try:
                    each.get(timeout=60)
                    won.add(total)
                except StageError:
                    pass
            assert len(won) == 1
