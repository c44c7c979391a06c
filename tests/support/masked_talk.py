"""A masked round that a test can bend at any message: real sites and a real unmasking server."""

from collections.abc import Mapping
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from support.masked_federations import NAMES, REPLIES, SESSION, Consortium

from fedgraft.client.app import app
from fedgraft.client.masked_participant import Kept
from fedgraft.client.secagg.round_secrets import Memory
from fedgraft.common.messages.codec import Stage, decode, encode, recall
from fedgraft.common.messages.masked_terms import (
    describe,
    evaluation_terms,
    floor_for,
    hash_work,
    training_terms,
)
from fedgraft.common.messages.payloads import (
    ConfirmAsk,
    EvaluateReply,
    EvaluateRequest,
    KeysAsk,
    MaskedEvaluate,
    MaskedTrain,
    PlanReply,
    Refusal,
    Request,
    ResultReply,
    SharesAsk,
    TrainReply,
    TrainRequest,
    UnmaskAsk,
)
from fedgraft.common.secagg.statements import Aggregate, Delivery
from fedgraft.server.protocol.unmasking_server import UnmaskingServer

__all__ = ["SECRETS", "Node", "Talk"]

SECRETS = ("seed", "mask_private", "seal_private", "open_keys", "shares")


class Node:
    """A node as Flower runs it: configuration, and a state that goes from message to message."""

    def __init__(self, config: Mapping[str, str]) -> None:
        self.config = dict(config)
        self.state = RecordDict()
        self.seen: set[bytes] = set()  # every secret that was ever in the state

    def ask(self, request: Request, stage: str) -> Any:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        message = Message(encode(request), dst_node_id=7, message_type=Stage[stage.upper()].value)
        context = Context(
            run_id=1, node_id=7, node_config=self.config, state=self.state, run_config={}
        )
        reply = app(message, context)
        if (memory := self.memory) is not None:
            for name in SECRETS:
                found = getattr(memory, name)
                self.seen |= {found} if isinstance(found, bytes) else set(found)
            self.seen -= {bytes(32), b""}
        clear = (PlanReply, TrainReply, EvaluateReply, ResultReply, Refusal)
        return decode(reply.content, *REPLIES, *clear)

    def code(self, request: Request, stage: str) -> str:
        """The code of the refusal that this must be."""
        said = self.ask(request, stage)
        assert isinstance(said, Refusal)
        return said.code

    @property
    def memory(self) -> Memory | None:
        kept = recall(self.state, Kept)
        return kept.memory if kept else None

    def copy(self) -> RecordDict:
        return RecordDict(dict(self.state))


class Talk:
    """A coordinator and its sites, in a round that stops where a test bends it."""

    def __init__(
        self,
        consortium: Consortium,
        request: TrainRequest | EvaluateRequest | None = None,
        *,
        number: int = 1,
        nodes: dict[str, Node] | None = None,
    ) -> None:
        self.consortium = consortium
        self.request = request or consortium.training()
        self.nodes = nodes or {name: Node(consortium.node(name)) for name in consortium.names}
        job, ids = consortium.job, tuple(range(consortium.sites))
        self.trains = isinstance(self.request, TrainRequest)
        self.work = "train" if self.trains else "evaluate"
        self.stages = ("keys", "shares", self.work, "confirm", "unmask")
        exchanged = consortium.plan.exchanged
        self.parameters = (
            training_terms(job, SESSION, ids, exchanged)
            if self.trains
            else evaluation_terms(job, SESSION, ids)
        )
        self.server = self.serve(self.request, number)
        work = describe(self.request)
        self.keys = KeysAsk(SESSION, work, ids, self.server.keys_request())

    def serve(self, request: TrainRequest | EvaluateRequest, number: int = 1) -> UnmaskingServer:
        """A server of a round with this work under these terms."""
        known = self.consortium.known
        return UnmaskingServer(
            roster=known.roster,
            policy=floor_for(known.policy, self.parameters, self.work),
            parameters=self.parameters,
            round_number=number,
            model=hash_work(describe(request)),
        )

    def task(self, delivery: Delivery) -> MaskedTrain | MaskedEvaluate:
        if isinstance(self.request, TrainRequest):
            return MaskedTrain(self.request, delivery)
        return MaskedEvaluate(self.request, delivery)

    def until(self, stage: str) -> dict[str, Any]:
        """Run all stages before ``stage``; what every site is to be asked then."""
        asks: dict[str, Any] = dict.fromkeys(self.nodes, self.keys)
        for now in self.stages[: self.stages.index(stage)]:
            asks = self.step(now, asks)
        return asks

    def step(self, stage: str, asks: dict[str, Any]) -> dict[str, Any]:
        """One stage; what every site is to be asked at the next."""
        place = self.stages.index(stage)
        names = ("advertisement", "shares", "masked", "confirmation", "opening")
        for name, ask in asks.items():
            getattr(self.server, f"add_{names[place]}")(self.nodes[name].ask(ask, stage))
        if stage == "keys":
            return dict.fromkeys(asks, SharesAsk(SESSION, self.server.close_keys()))
        if stage == "shares":
            boxes = self.server.close_shares()
            return {NAMES[site]: self.task(box) for site, box in boxes.items()}
        if stage == self.work:
            return dict.fromkeys(asks, ConfirmAsk(SESSION, self.server.close_training()))
        if stage == "confirm":
            return dict.fromkeys(asks, UnmaskAsk(SESSION, self.server.close_confirm()))
        return {}

    def finish(self) -> Aggregate:
        """The whole round."""
        self.step("unmask", self.until("unmask"))
        return self.server.finish()
