"""A member of a federation whose hands the test holds: real keys, a real session, any reply."""

import base64
import time
from collections.abc import Callable
from copy import deepcopy
from types import TracebackType
from typing import Self

from e2e.partners import Partners
from e2e.superlink import PATIENCE
from flwr.app import Message, RecordDict

from fedgraft.client.agent.process import Agent
from fedgraft.client.agent.superlink_session import ReceivedMessage, SuperLinkSession
from fedgraft.client.membership.credentials import load_tls_key
from fedgraft.client.membership.identity import load_identity
from fedgraft.common.federation.certificates import public_pem

__all__ = ["Puppet", "answering"]


class Puppet:
    """Site ``name`` of ``partners``, which has joined and has no process of its own.

    Use as a context manager: it has a session inside.
    """

    def __init__(self, partners: Partners, name: str) -> None:
        folder = partners.folder / name
        self.name, self.state = name, folder / "state"
        self.agent = Agent(
            site=name,
            endpoint=partners.endpoint,
            key=load_tls_key(self.state),
            sign=load_identity(self.state).sign,
            node_config={"site": str(folder / "site.toml")},
            tls=lambda: partners.tls(name),
        )
        self.fleet = SuperLinkSession(partners.endpoint, partners.tls(name), self.agent.key)

    def __enter__(self) -> Self:
        self.fleet.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.fleet.__exit__(kind, error, trace)

    @property
    def public(self) -> str:
        """Its node key as Flower's header has it."""
        return base64.b64encode(public_pem(self.agent.key.public_key())).decode()

    def answer(self, task: ReceivedMessage) -> Message:
        """What an honest site says, under its seal."""
        return self.agent.answer(task, self.fleet.node_id)

    def send(self, task: ReceivedMessage, content: RecordDict) -> None:
        """Send ``content`` in this site's session as the reply to ``task``, whoever was asked."""
        self.fleet.reply(task, Message(deepcopy(content), reply_to=task.message), 0.0)


def answering(
    puppets: tuple[Puppet, ...],
    until: Callable[[], bool],
    attack: Callable[[Puppet, ReceivedMessage], bool] = lambda puppet, task: False,
    limit: float = PATIENCE,
) -> None:
    """Have the puppets answer honestly what ``attack`` has not dealt with.

    Raises:
        TimeoutError: it is not over after ``limit`` seconds.
    """
    stop = time.monotonic() + limit
    while not until():
        if time.monotonic() > stop:
            raise TimeoutError(f"waited {limit:g} s in vain")
        for puppet in puppets:
            task = puppet.fleet.receive()
            if task is not None and not attack(puppet, task):
                puppet.send(task, puppet.answer(task).content)
        time.sleep(0.02)
