"""A site that joined as any other, and goes wrong: run as a script by tests.

    python faulty_site.py SITE.toml FAULT ...

Its n-th reply to TRAIN has the n-th fault, and what comes after those has none. What it sends is
signed with its own key, as a site that was broken into would. With ``ahead``, its clock is. With
``recorded``, what it sends is in `sent.bin` beside its SITE.toml as it was before encryption.
"""

import logging
import signal
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

import grpc
import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supernode import node_auth_http_interceptor

from fedgraft.client.agent.process import Agent
from fedgraft.client.agent.startup import make_agent
from fedgraft.client.agent.superlink_session import ReceivedMessage
from fedgraft.client.participant import Participant
from fedgraft.common.messages.codec import Stage, decode, encode
from fedgraft.common.messages.payloads import TrainReply
from fedgraft.common.messages.signatures import seal

__all__ = ["ALTERED", "LATE", "SENT"]

ALTERED: dict[str, tuple[Callable[[TrainReply], TrainReply], str]] = {
    "nan": (lambda said: replace(said, update=said.update * np.float32(np.nan)), "not-finite"),
    "huge": (lambda said: replace(said, update=said.update * np.float32(1e9)), "norm-too-large"),
    "shape": (lambda said: replace(said, update=said.update[:-1]), "wrong-shape"),
    "dtype": (lambda said: replace(said, update=said.update.astype(np.float64)), "wrong-dtype"),
    "names": (lambda said: replace(said, layout="0" * len(said.layout)), "wrong-layout"),
    "none": (lambda said: replace(said, examples=-9), "bad-count"),
    "many": (lambda said: replace(said, examples=1 << 62), "bad-count"),
    "loss": (lambda said: replace(said, loss=float("nan")), "bad-loss"),
    "stale": (lambda said: replace(said, round=said.round - 1), "wrong-round"),
    "session": (lambda said: replace(said, session="0" * 32), "wrong-session"),
}
"""What becomes of an update, and the reason for which it must not count."""

LATE = 12.0  # seconds
AHEAD, RECORDED = "ahead", "recorded"
CRASH = "crash="
SENT = "sent.bin"


@dataclass
class FaultyAgent(Agent):
    """An agent whose replies to TRAIN have ``faults``, one after the other.

    Beside those of ``ALTERED``: ``late`` ones come after ``LATE`` seconds, ``replayed`` ones are
    the one before, seal and all, ``other`` ones have a field that no update has. Instead of
    ``crash=TEXT`` ones training fails, and says TEXT.
    """

    faults: list[str] = field(default_factory=list)
    before: RecordDict = field(default_factory=RecordDict)

    def answer(self, task: ReceivedMessage, node_id: int) -> Message:
        """The reply as it should be, and then not."""
        trains = task.message.metadata.message_type == Stage.TRAIN
        if trains and self.faults and self.faults[0].startswith(CRASH):
            with crashing(self.faults.pop(0).removeprefix(CRASH)):
                return super().answer(task, node_id)
        reply = super().answer(task, node_id)
        if trains and self.faults:
            sealed = deepcopy(reply.content)
            self._spoil(self.faults.pop(0), reply, task.message.metadata.message_id)
            self.before = sealed
        return reply

    def _spoil(self, fault: str, reply: Message, request: str) -> None:
        if fault == "late":
            time.sleep(LATE)
            return
        if fault == "replayed":
            reply.content = self.before
            return
        content = reply.content
        for name in [name for name in content["payload"] if name.startswith("seal.")]:
            del content["payload"][name]
        if fault == "other":
            content["payload"] = ConfigRecord({**content["payload"], "note": "hello"})
        else:
            content = encode(ALTERED[fault][0](decode(content, TrainReply)))
        seal(content, site=self.site, request=request, sign=self.sign)
        reply.content = content


@contextmanager
def crashing(text: str) -> Iterator[None]:
    """Have training fail with an error that says ``text``, as a library's would that quotes it."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(text)

    theirs, Participant.train = Participant.train, fail  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Participant.train = theirs  # type: ignore[method-assign]


class Recorder(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Writes down every call: its method, its metadata and what was asked."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def _record(self, call: Any, details: Any, request: Any) -> Any:
        said = (details.method, repr(details.metadata))
        self._file.write("".join(said).encode() + request.SerializeToString())
        return call(details, request)

    intercept_unary_unary = intercept_unary_stream = _record  # type: ignore[assignment]


def record(file: BinaryIO) -> None:
    """Write all that this process sends over TLS to ``file``, before it is encrypted."""
    send, channel = ssl.SSLSocket.send, grpc.secure_channel

    def noted(self: ssl.SSLSocket, data: Any, flags: int = 0) -> int:
        file.write(bytes(data))
        return send(self, data, flags)

    ssl.SSLSocket.send = noted  # type: ignore[method-assign]  # sendall is made of it
    grpc.secure_channel = lambda *known: grpc.intercept_channel(channel(*known), Recorder(file))


def main(config: Path, faults: list[str]) -> None:
    """Take part until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if AHEAD in faults:
        node_auth_http_interceptor.now = lambda: datetime.now(UTC) + timedelta(hours=1)
    if RECORDED in faults:
        record((config.parent / SENT).open("ab", buffering=0))
    faults = [one for one in faults if one not in (AHEAD, RECORDED)]
    agent = FaultyAgent(**vars(make_agent(config)), faults=faults)

    def stop(*_: object) -> None:
        agent.stopping = True

    signal.signal(signal.SIGTERM, stop)
    agent.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
