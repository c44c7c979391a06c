"""What nginx refused: every kind told once with a count, whatever a stranger does to the log."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.matrix import tries

from fedgraft.server.coordinator import nginx_refusals as refusals
from fedgraft.server.coordinator.nginx_refusals import (
    ACTIVATE,
    LARGE,
    PATIENCE,
    WINDOW,
    RefusedRequests,
    Tail,
)

START = 1_800_000_000.0
STAMP = "2027-01-15T08:00:00+00:00"  # the same


def line(status: object = 403, site: object = "CN=a", path: str = "/x", **more: Any) -> bytes:
    verify = "SUCCESS" if site else "NONE"
    facts = {"time": STAMP, "status": status, "site": site, "verify": verify, "path": path}
    return json.dumps(facts | more).encode() + b"\n"


class Desk:
    """RefusedRequests with a clock and a log that a test writes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now = folder, START
        self.events: list[dict[str, Any]] = []
        self.reopened = 0
        self.nodes: dict[str, dict[str, Any]] = {}
        self.open()

    def open(self) -> None:
        self.refusals = RefusedRequests(
            self.folder, self._event, reopen=self._reopen, clock=lambda: self.now
        )

    @property
    def log(self) -> Path:
        return self.folder / "refused.log"

    def _event(self, kind: str, **facts: Any) -> None:
        self.events.append({"event": kind, **facts})

    def _reopen(self) -> None:
        self.reopened += 1

    def write(self, *lines: bytes) -> None:
        with self.log.open("ab") as file:
            file.writelines(lines)

    def after(self, seconds: float) -> list[dict[str, Any]]:
        """The events of a look now and of one ``seconds`` later."""
        before = len(self.events)
        self.refusals.tend(self.nodes)
        self.now += seconds
        self.refusals.tend(self.nodes)
        return self.events[before:]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def told(count: int = 1, **facts: Any) -> dict[str, Any]:
    known = {"site": "a", "status": 403, "path": "/x", "certificate": "SUCCESS"}
    return {"event": "refused", **known, **facts, "count": count}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 429])
def test_a_refusal_has_code_site_and_path(desk: Desk, status: int) -> None:
    desk.write(line(status))
    assert desk.after(WINDOW) == [told(status=status)]
    assert desk.refusals.totals == {str(status): 1}
    facts = {"site": "a", "status": status, "path": "/x", "certificate": "SUCCESS", "count": 1}
    assert list(desk.refusals.recent) == [{"time": START, **facts}]


def test_what_is_alike_in_a_minute_is_one_line(desk: Desk) -> None:
    desk.write(*[line()] * 5000, line(404, site="", path="/docs"))
    assert desk.after(WINDOW - 1) == []
    desk.write(line())
    assert desk.after(1) == [
        told(5001),
        told(status=404, site="", path="/docs", certificate="NONE"),
    ]
    assert desk.after(10 * WINDOW) == []


def test_a_name_without_a_valid_certificate_is_told_as_such(desk: Desk) -> None:
    desk.write(line(400, verify="FAILED:certificate revoked"))
    assert desk.after(WINDOW) == [told(status=400, certificate="FAILED:certificate revoked")]


def test_a_flood_of_different_paths_cannot_fill_the_audit(desk: Desk) -> None:
    desk.write(*(line(404, site="", path=f"/{number}") for number in range(20_000)))
    for _ in range(20):
        desk.refusals.tend({})
    events = desk.after(WINDOW)
    assert len(events) == 11
    assert sum(event["count"] for event in events) == 20_000
    assert events[0] == told(19_990, site="", status=404, path="(others)", certificate="")
    assert desk.refusals.totals == {"404": 20_000}
    assert len(desk.refusals.recent) <= 10


def test_clients_that_went_away_and_faults_of_ours_are_no_refusals(desk: Desk) -> None:
    desk.write(line(499), line(408), line(502), line(200))
    assert desk.after(WINDOW) == []
    assert not desk.refusals.totals


@pytest.mark.parametrize(
    "bad",
    [
        b"\n", b"{}\n", b"[1]\n", b"no\n", b"[" * 50_000 + b"\n", line(time="no"),
        line(status="x"), line(site=3), b'{"status":\xff}\n',
    ],
)  # fmt: skip
def test_lines_that_are_none_are_passed_over(desk: Desk, bad: bytes) -> None:
    desk.write(bad, line())
    assert desk.after(WINDOW) == [told()]


def test_paths_of_any_bytes_are_told_harmlessly(desk: Desk) -> None:
    """nginx decodes what was asked for, and writes bytes as they are."""
    raw = line(path="/@").replace(b"@", b"\xff\xc3\xa4\x7f")
    desk.write(raw, line(path="/\x1b[31m\u202e\n" + "x" * 500))
    first, second = (event["path"] for event in desk.after(WINDOW))
    assert first == "/???"
    assert second.startswith("/?[31m??xxx")
    assert len(second) == 120


# --- a second session


def second(**more: Any) -> bytes:
    return line(412, path=ACTIVATE, **more)


def alive(since: float, status: str = "online") -> dict[str, dict[str, Any]]:
    return {"a": {"status": status, "activated": since, "last_seen": START}}


def alarms(events: list[dict[str, Any]]) -> list[str]:
    return [event["site"] for event in events if event["event"] == "second-session"]


def test_a_second_session_leaves_a_line_and_an_alarm_once(desk: Desk) -> None:
    desk.nodes = alive(START - 500)
    desk.write(second())
    events = desk.after(PATIENCE - 1)
    assert events == [told(status=412, path=ACTIVATE)]
    events = desk.after(1)
    assert alarms(events) == ["a"]
    assert "somebody else has its key" in events[0]["what"]
    assert desk.refusals.alarms == {"a": desk.now}
    for _ in range(5):  # it tries on and on
        desk.write(second())
        assert not alarms(desk.after(PATIENCE))
    desk.now += 3600
    desk.write(second())
    assert alarms(desk.after(PATIENCE)) == ["a"]


@pytest.mark.parametrize(
    "nodes",
    [alive(START + 30), alive(START + 1), alive(START - 500, "offline"), {}],
    ids=["it came back", "in the same second", "it is gone", "not known"],
)
def test_a_site_that_starts_again_is_no_alarm(desk: Desk, nodes: dict[str, Any]) -> None:
    desk.nodes = nodes
    desk.write(second())
    assert not alarms(desk.after(PATIENCE))


def test_a_stranger_cannot_raise_the_alarm(desk: Desk) -> None:
    desk.nodes = alive(START - 500)
    desk.write(second(verify="FAILED:x"), line(412, path="/v1/fleet/push-messages"))
    assert not alarms(desk.after(PATIENCE))
    assert desk.refusals.totals == {"412": 2}


# --- the log moves, and we do


def test_a_large_log_is_moved_away_and_followed(desk: Desk) -> None:
    (desk.folder / "error.log").write_bytes(b"x")
    desk.write(b"x" * (LARGE + 1) + b"\n", line())
    while not desk.after(0) and desk.refusals.totals["403"] < 1:
        pass
    assert desk.reopened == 1
    moved = desk.folder / "refused.before.log"
    assert moved.exists()
    assert not desk.log.exists()
    with moved.open("ab") as file:  # nginx has not heard of it yet
        file.write(line())
    desk.after(0)
    desk.write(line(404))
    with moved.open("ab") as file:
        file.write(line())
    for _ in range(5):
        desk.after(0)
    assert desk.refusals.totals == {"403": 3, "404": 1}
    assert (desk.folder / "error.log").exists()


def test_nginxs_errors_are_moved_away_too(desk: Desk) -> None:
    (desk.folder / "error.log").write_bytes(b"x" * LARGE)
    desk.after(0)
    assert desk.reopened == 1
    assert (desk.folder / "error.before.log").exists()


def test_after_a_restart_nothing_is_told_twice(desk: Desk) -> None:
    desk.write(line())
    desk.after(1)
    desk.refusals.close()
    assert desk.events == [told()]
    desk.open()
    desk.write(line(404))
    assert desk.after(WINDOW) == [told(status=404)]


def test_a_new_log_after_a_restart_is_read_from_its_start(desk: Desk) -> None:
    desk.write(line(), line())
    desk.after(WINDOW)
    desk.refusals.close()
    desk.log.unlink()
    desk.write(line(404))
    desk.open()
    assert desk.after(WINDOW) == [told(status=404)]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '["a", 2]', "[null, 3]"])
def test_a_damaged_position_is_no_position(desk: Desk, text: str) -> None:
    (desk.folder / "refused.json").write_text(text)
    desk.open()
    desk.write(line())
    assert desk.after(WINDOW) == [told()]


def test_no_log_yet(desk: Desk) -> None:
    assert desk.after(WINDOW) == []
    desk.refusals.close()
    assert not (desk.folder / "refused.json").exists()


@settings(max_examples=tries(60), deadline=None)
@given(
    steps=st.lists(
        st.one_of(st.binary(max_size=12), st.sampled_from(["move", "read"])), max_size=30
    ),
    limit=st.integers(1, 40),
)
def test_a_tail_gives_each_line_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, steps: list[bytes | str], limit: int
) -> None:
    """Whatever is appended, and also when the file is moved once it was read to its end."""
    folder = tmp_path_factory.mktemp("tail")
    tail, written, found = Tail(folder / "log"), b"", []

    def read_all() -> None:
        idle = 0
        while idle < 4:
            got = tail.read(limit)
            found.extend(got)
            idle = 0 if got else idle + (tail.position[1] == _size(tail))

    (folder / "log").touch()
    for number, step in enumerate(steps):
        if isinstance(step, bytes):
            with (folder / "log").open("ab") as file:
                file.write(step)
            written += step
            continue
        if step == "move":
            with (folder / "log").open("ab") as file:
                file.write(b"\n")
            written += b"\n"
        read_all()
        if step == "move":
            (folder / "log").rename(folder / f"log.{number}")
            (folder / "log").touch()
            read_all()
    read_all()
    tail.close()
    assert found == written.split(b"\n")[:-1]


def _size(tail: Tail) -> int:
    """Bytes of complete lines in the file that the tail is at."""
    content = tail.path.read_bytes()
    return content.rfind(b"\n") + 1


def test_a_log_that_is_cut_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\nthr")
    tail = Tail(path)
    assert tail.read(100) == [b"one", b"two"]
    path.write_bytes(b"new\n")
    assert tail.read(100) == [b"new"]
    tail.close()


def test_an_endless_line_is_not_kept_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "LONGEST", 10)
    path = tmp_path / "log"
    path.write_bytes(b"x" * 100 + b"\nnext\n")
    tail = Tail(path)
    lines = [line for _ in range(40) for line in tail.read(7)]
    tail.close()
    assert lines[-1] == b"next"
    assert all(len(line) <= 17 for line in lines)
