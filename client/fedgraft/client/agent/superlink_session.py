"""A site's session with the coordinator's SuperLink, in one process that runs as long as the site.

Flower starts a process for every message, and asks the coordinator for the app to run. Our site
does neither: it takes a message, gives it to the installed code and sends the result.
tests/e2e/test_contract.py compares the internals of Flower that are used here with the real ones.
"""

import logging
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedgraft.common.messages.flower_objects import known_objects, unasked_objects

__all__ = [
    "MessageExpired",
    "ReceivedMessage",
    "Refused",
    "SessionAlive",
    "SessionError",
    "SessionUnknown",
    "SuperLinkSession",
    "Unreachable",
]

log = logging.getLogger("fedgraft.client")

FIRST_WAIT, LONGEST_WAIT, PATIENCE = 0.01, 0.5, 300.0  # seconds to wait for missing objects
BEAT = HEARTBEAT_DEFAULT_INTERVAL / 2  # seconds; Flower gives a node up after one interval


class SessionError(Exception):
    """The coordinator could not be asked; the class says what to do about it."""


class Unreachable(SessionError):
    """There was no answer, or none that a SuperLink gives: try again."""


class SessionAlive(SessionError):
    """For the coordinator, this site's last session is alive; it ends in about a minute."""


class SessionUnknown(SessionError):
    """The coordinator does not know this session any more: begin a new one."""


class Refused(SessionError):
    """Certificate, revocation, clock or path are the cause: a person must look at it."""


class MessageExpired(SessionError):
    """Nobody waits for a message any more, for example because its run was stopped."""


@dataclass(frozen=True)
class ReceivedMessage:
    """A message for this site, and the Flower run that it belongs to."""

    message: Message
    run_id: int


class SuperLinkSession:
    """One session of a site. Use it as a context manager, which ends the session on exit.

    ``endpoint`` is ``host:port`` of the coordinator's public port; ``tls`` holds the federation's
    CA and this site's certificate; ``key`` is the P-256 key that was enrolled.
    """

    def __init__(
        self, endpoint: str, tls: ssl.SSLContext | None, key: EllipticCurvePrivateKey
    ) -> None:
        public = key.public_key()
        self._public = public_key_to_bytes(public)
        self._client = FleetHttpClient(
            f"{'https' if tls else 'http'}://{endpoint}",
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, public),
            ],
            verify=tls or False,
        )
        self.node: Node | None = None
        self._stop = threading.Event()
        self._beating: threading.Thread | None = None
        self._lost: SessionError | None = None

    def __enter__(self) -> Self:
        """Begin the session.

        Raises:
            SessionError: its class says what to do.
        """
        request = ActivateNodeRequest(
            public_key=self._public, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        self.node = Node(node_id=_asked(self._client.ActivateNode, request).node_id)
        self._beating = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self._beating.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._beating:
            self._beating.join()
        if self.node and not isinstance(error, SessionError):
            with suppress(SessionError):  # the coordinator notices by itself
                goodbye = DeactivateNodeRequest(node_id=self.node.node_id)
                _asked(self._client.DeactivateNode, goodbye)
        self._client._client.close()

    @property
    def node_id(self) -> int:
        """The id that the SuperLink gave this session."""
        assert self.node is not None, "not entered"  # noqa: S101
        return int(self.node.node_id)

    def receive(self) -> ReceivedMessage | None:
        """Return the next message for this site with all its content; None if there is none.

        Raises:
            MessageExpired: nobody waits for the message, or its parts make no message.
            SessionError: its class says what to do.
        """
        if self._lost:
            raise self._lost
        reply = _asked(self._client.PullMessages, PullMessagesRequest(node=self.node))
        if not reply.messages_list:
            return None
        try:
            return self._collect(reply)
        except SessionError:
            raise
        except ObjectPullError:  # the object was there when it was announced
            raise MessageExpired from None
        except Exception as error:  # no message may end the site
            log.warning("a message is not whole: %s", type(error).__name__)
            raise MessageExpired from None

    def _collect(self, reply: PullMessagesResponse) -> ReceivedMessage:
        """Return the message that was announced."""
        run_id, tree = reply.messages_list[0].metadata.run_id, reply.message_object_trees[0]
        # Flower's records read these values wherever the records are made.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, self.node_id
        pull = make_pull_object_fn_protobuf(self._ask(self._client.PullObject), self.node, run_id)
        confirm = make_confirm_message_received_fn_protobuf(
            self._ask(self._client.ConfirmMessageReceived), self.node, run_id
        )
        # The coordinator's objects come after its message. Flower first waits for a second, so each
        # stage of a round would take a second.
        parts = [part.object_id for part in iterate_object_tree(tree)]
        contents = known_objects(parts, reply.messages_list[0])
        contents |= pull_objects(
            [part for part in parts if part not in contents],
            pull,
            max_time=PATIENCE,
            initial_backoff=FIRST_WAIT,
            backoff_cap=LONGEST_WAIT,
        )
        confirm(tree.object_id)
        message = inflate_object_from_contents(tree.object_id, contents)
        message.metadata.__dict__["_message_id"] = tree.object_id
        return ReceivedMessage(message, run_id)

    def reply(self, received: ReceivedMessage, message: Message, seconds: float) -> None:
        """Send ``message``, which took ``seconds`` to make, in reply to ``received``.

        Raises:
            MessageExpired: nobody waits for it.
            SessionError: its class says what to do.
        """
        message.metadata.__dict__["_message_id"] = message.object_id
        with no_object_id_recompute():
            objects, tree = get_all_nested_objects(message), get_object_tree(message)
            bare = remove_content_from_message(message) if message.has_content() else message
            reply = _asked(
                self._client.PushMessages,
                PushMessagesRequest(
                    node=self.node,
                    messages_list=[message_to_proto(bare)],
                    message_object_trees=[tree],
                    clientapp_runtime_list=[seconds],
                ),
            )
            push = make_push_object_fn_protobuf(
                self._ask(self._client.PushObject), self.node, received.run_id, reply.session_id
            )
            wanted = set(reply.objects_to_push) - unasked_objects(message)
            try:
                push_objects(objects, push, object_ids_to_push=wanted)
            except ObjectPushError:
                raise MessageExpired from None

    def _ask(self, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda request: _asked(call, request)

    def _beat(self) -> None:
        request = SendNodeHeartbeatRequest(
            node=self.node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        while not self._stop.wait(BEAT):
            try:
                if not _asked(self._client.SendNodeHeartbeat, request).success:
                    raise SessionUnknown
            except Unreachable:
                continue  # the next request reports it
            except SessionError as error:
                self._lost = error
                return


def _asked(call: Callable[[Any], Any], request: Any) -> Any:
    """Return the answer of ``call``; an error becomes a SessionError without the other's text."""
    try:
        return call(request)
    except ValueError:
        raise Unreachable("no SuperLink") from None
    except httpx.RequestError as error:
        if isinstance(error.__cause__, ssl.SSLError) or "SSL" in str(error):
            raise Refused("tls") from None
        raise Unreachable(type(error).__name__) from None
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        if status == httpx.codes.PRECONDITION_FAILED:
            raise SessionAlive from None
        if status in (httpx.codes.UNAUTHORIZED, httpx.codes.NOT_FOUND):
            raise SessionUnknown(str(status)) from None
        if status == httpx.codes.FORBIDDEN and _run_is_over(error.response):
            raise MessageExpired from None
        if status in (httpx.codes.FORBIDDEN, httpx.codes.BAD_REQUEST):
            raise Refused(str(status)) from None
        raise Unreachable(str(status)) from None


def _run_is_over(response: httpx.Response) -> bool:
    """Return whether Flower refuses, and not the proxy before it, which sends no JSON."""
    try:
        return bool(response.json()["code"] == ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED)
    except (ValueError, KeyError, TypeError):
        return False
