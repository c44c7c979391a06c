"""What the coordinator of a masked run receives, logs and writes says nothing of any one site."""

import contextlib
import json
import logging
import re
import tomllib
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from flwr.app import RecordDict
from numpy.typing import NDArray
from support.masked_federations import NAMES, Consortium, MaskedRun, make_job, saying
from support.masked_talk import SECRETS, Talk
from support.payload_samples import saved

from fedgraft.client import app as client
from fedgraft.client.masked_participant import Kept
from fedgraft.client.participant import Participant
from fedgraft.client.secagg.round_secrets import Memory
from fedgraft.client.training.trainer import Trained, Wanted
from fedgraft.common.messages.codec import decode, remember
from fedgraft.common.messages.payloads import EvaluateRequest, TrainReply, TrainRequest
from fedgraft.common.metrics.tally import Tally
from fedgraft.common.secagg.quantize import packed_size
from fedgraft.common.secagg.statements import MaskedInput

LOGGERS = ("", "fedgraft", "fedgraft.client", "flwr")
SIZES = (161, 143, 137, 131, 151, 173)
CLOCKS = (
    "seconds",
    "time",
    "created",
)  # keys of what says when, or how long: no site has a part in it
# All that a site may say under secure aggregation: its fields, with the size of those of bytes.
ALLOWED: dict[str, dict[str, Any]] = {
    "PlanReply": {"session": str, "site": str},
    "Advertisement": {
        "site": int,
        "mask_key": 32,
        "seal_key": 32,
        "commitment": 32,
        "signature": 64,
    },
    "SealedShares": {
        "site": int,
        "envelopes.sender": int,
        "envelopes.recipient": int,
        "envelopes.ciphertext": 80,
    },
    "MaskedInput": {"site": int, "signature": 64},
    "Confirmation": {"site": int, "signature": 64},
    "Opening": {"site": int, "shares.owner": int, "shares.share": 32},
    "Refusal": {"session": str, "code": str},
}


@dataclass
class Seen:
    """A finished run: what it left, and what none but its sites may know."""

    run: MaskedRun
    trained: list[TrainReply] = field(default_factory=list)
    tallied: list[Tally] = field(default_factory=list)
    memories: list[Memory] = field(default_factory=list)
    entries: list[logging.LogRecord] = field(default_factory=list)
    printed: str = ""

    @property
    def replies(self) -> list[tuple[str, str, RecordDict]]:
        found = self.run.grids[0].replies
        return [(stage, site, content) for stage, site, content in found if content is not None]

    @cached_property
    def said(self) -> bytes:
        """Every byte of every reply."""
        configs, arrays = [], []
        for _, _, content in self.replies:
            configs += [part.deflate() for part in content.config_records.values()]
            records = content.array_records.values()
            arrays += [array.data for part in records for array in part.values()]
        return b"\0".join([*configs, *arrays])

    @cached_property
    def secrets(self) -> set[bytes]:
        """Keys and seeds, those of the identities included; shares apart."""
        found: set[bytes] = set()
        for memory in self.memories:
            found |= {memory.seed, memory.mask_private, memory.seal_private, *memory.open_keys}
        for name in self.run.consortium.names:
            pem = (self.run.consortium.folder / name / "identity.pem").read_bytes()
            key: Any = load_pem_private_key(pem, password=None)
            found |= {key.private_bytes_raw(), b"".join(pem.splitlines()[1:-1])}
        return found - {bytes(32)}

    @cached_property
    def shares(self) -> set[bytes]:
        """Pairs of shares that sites held for each other."""
        return {share for memory in self.memories for share in memory.shares} - {bytes(64)}

    @property
    def numbers(self) -> set[float]:
        """Examples, losses and metrics of single sites, of which none is a number like 0 or 1."""
        found = {float(reply.examples) for reply in self.trained}
        found |= {reply.loss for reply in self.trained}
        for tally in self.tallied:
            found |= {float(tally.examples), tally.loss, *tally.summary().values()}
        return {number for number in found if number not in (0.0, 1.0)}

    @cached_property
    def log(self) -> str:
        """Messages of every logger, all else that is in their records, and what was printed."""
        lines = [f"{entry.getMessage()} {entry.__dict__!r}" for entry in self.entries]
        return "\n".join([*lines, self.printed])

    @cached_property
    def files(self) -> dict[str, bytes]:
        """The run's folder, without what is the sites' own."""
        folder = self.run.run.folder
        paths = [path for path in folder.rglob("*") if path.is_file()]
        outside = [path for path in paths if folder / "sites" not in path.parents]
        return {str(path.relative_to(folder)): path.read_bytes() for path in outside}


class _Keeper(logging.Handler):
    def __init__(self, entries: list[logging.LogRecord]) -> None:
        super().__init__(logging.DEBUG)
        self.entries = entries

    def emit(self, record: logging.LogRecord) -> None:
        self.entries.append(record)


@contextlib.contextmanager
def listening(seen: Seen, printed: Path) -> Iterator[None]:
    """Keep every log record and all that is printed."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels, keeper = [logger.level for logger in loggers], _Keeper(seen.entries)
    with printed.open("w") as file:
        for logger in loggers:
            logger.addHandler(keeper)
            logger.setLevel(logging.DEBUG)
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.removeHandler(keeper)
                logger.setLevel(level)
    seen.printed = printed.read_text()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Three rounds with validation, a site that is lost in one and one with a loss of NaN."""
    torch.set_num_threads(1)
    settings = {"validation": 0.25, "count": 3, "privacy": {"max_weight": 200}}
    folder = tmp_path_factory.mktemp("leaks")
    found = Seen(MaskedRun.create(folder, settings, sites=6, sizes=SIZES))
    train, tally = Participant.train, Participant.tally

    def trained(at: Participant, request: TrainRequest) -> Generator[Wanted, Trained, TrainReply]:
        found.trained.append((yield from train(at, request)))
        diverged = at.config.name == "oak" and request.round == 3
        return replace(found.trained[-1], loss=float("nan")) if diverged else found.trained[-1]

    def tallied(at: Participant, request: EvaluateRequest) -> Tally:
        found.tallied.append(tally(at, request))
        return found.tallied[-1]

    def remembered(state: RecordDict, kept: Kept | None) -> None:
        found.memories += [kept.memory] if kept is not None else []
        remember(state, kept)

    with pytest.MonkeyPatch.context() as patch, listening(found, folder / "printed"):
        patch.setattr(Participant, "train", trained)
        patch.setattr(Participant, "tally", tallied)
        patch.setattr(client, "remember", remembered)
        found.run.go({"cedar": "train/2=lost"})
    return found


def test_the_run_was_as_it_should_be(seen: Seen) -> None:
    dropped = [[(drop.site, drop.reason) for drop in each.dropped] for each in seen.run.records]
    assert dropped == [[], [("cedar", "app-failed")], [("oak", "abstained")]]
    assert [record.sites for record in seen.run.records] == [6, 5, 5]
    assert all(record.validation for record in seen.run.records)
    assert len(seen.trained) == len(seen.tallied) == 18
    assert "abstained from a masked round: InputRefused" in seen.log  # it was listened to


def test_sites_say_nothing_beyond_the_protocol(seen: Seen) -> None:
    kinds = set()
    for _, site, content in seen.replies:
        values: dict[str, Any] = dict(content["payload"])
        kind, version = values.pop("kind"), values.pop("format")
        kinds.add(kind)
        if kind == "MaskedInput":  # the file of its vector, which is looked at below, and no more
            assert values.pop("packed") == saved(decode(content, MaskedInput).packed)
        assert version == 2 and set(values) == set(ALLOWED[kind])
        assert set(content) == {"payload"}
        for key, value in values.items():
            wanted = ALLOWED[kind][key]
            for item in value if isinstance(value, list) else [value]:
                if isinstance(wanted, int):
                    assert type(item) is bytes and len(item) == wanted
                else:
                    assert type(item) is wanted
                    assert wanted is not int or item in range(len(SIZES))  # an id, no count
        assert values.get("site", site) in (site, NAMES.index(site))
        assert values.get("code", "abstained") == "abstained"
        assert values.get("session", seen.run.run.session) == seen.run.run.session
    assert kinds == set(ALLOWED)


def masked_inputs(seen: Seen, stage: str) -> list[NDArray[np.uint8]]:
    return [
        decode(content, MaskedInput).packed
        for at, _, content in seen.replies
        if at == stage and content["payload"]["kind"] == "MaskedInput"
    ]


def look_like_noise(vectors: list[NDArray[np.uint8]]) -> None:
    """Bytes are uniform, by chi-square, and no two vectors have more in common than chance."""
    counts = np.bincount(np.concatenate(vectors), minlength=256)
    expected = counts.sum() / 256
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert 130 < chi < 420  # beyond seven standard deviations, of 255 degrees of freedom
    for place, one in enumerate(vectors):
        for other in vectors[:place]:
            assert (one == other).mean() < 0.06  # 1/256 by chance
            assert not np.array_equal(one[:4], other[:4])  # the count, which is 1 in all of them


@pytest.mark.parametrize(("stage", "length", "bits"), [("train", 1546, 24), ("evaluate", 100, 32)])
def test_masked_vectors_have_one_size_and_look_like_noise(
    seen: Seen, stage: str, length: int, bits: int
) -> None:
    vectors = masked_inputs(seen, stage)
    assert {vector.shape for vector in vectors} == {(packed_size(length, bits),)}
    assert len(vectors) == (16 if stage == "train" else 18)
    look_like_noise(vectors)


def test_equal_updates_look_different_at_every_site_and_in_every_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = TrainReply("", 1, "", 50, 1.0, np.zeros(1546, np.float32))
    monkeypatch.setattr(Participant, "train", saying(nothing))
    vectors = []
    for name in ("one", "other"):
        grid = Consortium(tmp_path / name, make_job(), sites=4).run_round()[2]
        found = [content for stage, _, content in grid.replies if stage == "train" and content]
        vectors += [decode(content, MaskedInput).packed for content in found]
    assert len(vectors) == 8
    look_like_noise(vectors)


def test_private_keys_seeds_and_shares_are_nowhere_but_at_the_sites(seen: Seen) -> None:
    assert len(seen.secrets) > 6 * 6 * 3 and len(seen.shares) > 200
    for secret in seen.secrets | seen.shares:
        assert secret not in seen.said
    written, log = b"\0".join(seen.files.values()), seen.log
    halves = {half for both in seen.shares for half in (both[:32], both[32:])}
    for secret in seen.secrets | halves:
        assert secret not in written and secret.hex().encode() not in written
        assert secret.hex() not in log and repr(secret)[2:-1] not in log


def test_no_piece_of_an_update_is_sent_logged_or_written(seen: Seen) -> None:
    said, written = seen.said, b"\0".join(seen.files.values())
    for reply in seen.trained:
        adapter = np.abs(reply.update)
        for place in np.argsort(adapter)[-8:]:
            piece = reply.update[max(place - 1, 0) : place + 1].tobytes()
            assert piece not in said and piece not in written
            # A record's clock may hold these digits by chance, but no number begins with them.
            printed = re.escape(f"{reply.update[place]:.6}")
            assert not re.search(rf"(?<![\d.]){printed}", seen.log)


def numbers_in(value: Any) -> Iterator[float]:
    """Every number in a JSON or TOML value, those in its strings included, but for clocks."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from numbers_in(str(key))
            yield from numbers_in(item if key not in CLOCKS else None)
    elif isinstance(value, list):
        for item in value:
            yield from numbers_in(item)
    elif isinstance(value, str):
        yield from map(float, re.findall(r"(?<![\w.-])\d+(?:\.\d+)?(?![\w.-])", value))
    elif isinstance(value, int | float):
        yield float(value)


def read_values(seen: Seen) -> list[Any]:
    """All that the run's JSON and TOML files hold."""
    values: list[Any] = []
    for name, content in seen.files.items():
        if name.endswith(".jsonl"):
            values += map(json.loads, content.splitlines())
        elif name.endswith(".json"):
            values.append(json.loads(content))
        elif name.endswith(".toml"):
            values.append(tomllib.loads(content.decode()))
    return values


def near(numbers: set[float], others: set[float]) -> list[tuple[float, float]]:
    """Pairs that agree to five digits: rounding hides nothing."""
    return [(a, b) for a in numbers for b in others if abs(a - b) <= 1e-5 * abs(a)]


def test_no_number_of_a_site_is_in_the_runs_files(seen: Seen) -> None:
    found = set(numbers_in(read_values(seen)))
    assert {record.train_loss for record in seen.run.records} <= found  # it looks at them
    assert {"metrics.jsonl", "events.jsonl", "run.json", "job.toml"} <= set(seen.files)
    # A number that the job file has says nothing of a site.
    told = set(numbers_in(seen.run.run.job.model_dump(mode="json")))
    own = {number for number in seen.numbers if not near({number}, told)}
    assert len(own) > 16 * 3
    assert near(own, found) == []


def test_no_number_of_a_site_is_logged_or_printed(seen: Seen) -> None:
    ours = [entry for entry in seen.entries if entry.name.split(".")[0] in {"root", *LOGGERS}]
    assert any("abstained" in entry.getMessage() for entry in ours)
    text = "\n".join([*(entry.getMessage() for entry in ours), seen.printed])
    assert near(seen.numbers, set(numbers_in(text))) == []


def test_no_histogram_of_a_site_is_in_the_runs_files(seen: Seen) -> None:
    def lists_in(value: Any) -> Iterator[list[Any]]:
        if isinstance(value, list):
            yield value
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, list | dict):
                yield from lists_in(item)

    lists = [found for value in read_values(seen) for found in lists_in(value)]
    assert ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"] in lists  # the labels: it looks
    assert not any(isinstance(item, int | float) for found in lists for item in found)


# Secrets at the sites


@pytest.mark.parametrize("work", ["train", "evaluate"])
def test_no_secret_of_a_round_is_ever_on_disk_not_even_a_sites_own(
    tmp_path: Path, work: str
) -> None:
    consortium = Consortium(tmp_path, make_job(validation=0.25), sites=4)
    talk = Talk(consortium, consortium.evaluating() if work == "evaluate" else None)
    written = b""
    asks: dict[str, Any] = dict.fromkeys(talk.nodes, talk.keys)
    for stage in talk.stages:
        asks = talk.step(stage, asks)
        files = [path for path in consortium.folder.rglob("*") if path.is_file()]
        written += b"".join(path.read_bytes() for path in files)
    assert b"1 UNMASK" in written
    for node in talk.nodes.values():
        # seed, two private keys, the keys of three neighbours, and a share of each of four sites
        assert len(node.seen) >= 3 + 3 + 4
        for secret in node.seen:
            for shape in (secret, secret.hex().encode(), secret[:32], secret[32:] or secret):
                assert shape not in written


def test_reprs_of_memory_hold_no_secret(tmp_path: Path) -> None:
    talk = Talk(Consortium(tmp_path, make_job(), sites=3))
    talk.until("train")
    memory = talk.nodes["ash"].memory
    assert memory is not None
    shown = repr(memory)
    hidden = {each.name for each in fields(Memory) if not each.repr}
    assert hidden == set(SECRETS)
    assert not any(f"{name}=" in shown for name in SECRETS)
