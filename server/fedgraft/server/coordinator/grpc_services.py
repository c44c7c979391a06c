"""The coordinator's gRPC services on two sockets: one behind nginx for sites, one for operators.

The sockets are files in a folder of mode 0700. Only this user can open them, and nginx runs as this
user. A call that fails returns an error code without the reason.
"""

import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from fedgraft.common.backbones.blob_store import BlobStore
from fedgraft.common.errors import FedgraftError, InputError
from fedgraft.common.messages.grpc_channel import SERVER_OPTIONS
from fedgraft.common.rpc import fedgraft_v1_pb2 as pb
from fedgraft.common.rpc import fedgraft_v1_pb2_grpc as services
from fedgraft.server.enrollment.backbone_service import BackboneService
from fedgraft.server.enrollment.service import EnrolmentService, MembershipService

__all__ = ["OperatorService", "serve_operators", "serve_sites"]

THREADS = 16
LONGEST = 107  # bytes of a socket's path, unix(7)
Event = Callable[..., None]

log = logging.getLogger("fedgraft.server")


class OperatorService(services.OperatorServicer):
    """The service that `fedgraft submit` and `fedgraft coordinator status|stop` call."""

    def __init__(
        self,
        submit: Callable[[str], str],
        status: Callable[[], dict[str, Any]],
        stop: Callable[[str], None],
    ) -> None:
        self._submit, self._status, self._stop = submit, status, stop

    def Submit(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Take a job; return the name of its run."""
        return pb.SubmitReply(run=_answered(context, self._submit, request.job))

    def Status(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Return the coordinator's status, as JSON."""
        return pb.StatusReply(status=json.dumps(_answered(context, self._status)))

    def Stop(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Stop a run, or the coordinator."""
        _answered(context, self._stop, request.run)
        return pb.StopReply()


def _answered(context: grpc.ServicerContext, call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except FedgraftError as error:  # the operator is on this host, and may read our error text
        text = json.dumps({"error": str(error), "hint": error.hint, "code": error.exit_code})
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)


def serve_sites(home: Path, event: Event) -> grpc.Server:
    """Serve enrolment and membership on ``run/services.sock``."""
    server = _make_server(THREADS, "sites")
    services.add_EnrolmentServicer_to_server(EnrolmentService(home, event), server)
    services.add_MembershipServicer_to_server(MembershipService(home, event), server)
    backbones = BackboneService(BlobStore(home / "backbones"))
    services.add_BackbonesServicer_to_server(backbones, server)
    return _listen(server, home / "run" / "services.sock")


def serve_operators(home: Path, operator: OperatorService) -> grpc.Server:
    """Serve ``operator`` on ``run/operator.sock``."""
    server = _make_server(2, "operators")
    services.add_OperatorServicer_to_server(operator, server)
    return _listen(server, home / "run" / "operator.sock")


def _make_server(threads: int, name: str) -> grpc.Server:
    pool = ThreadPoolExecutor(threads, name)
    return grpc.server(pool, interceptors=[_Discreet()], options=SERVER_OPTIONS)


class _Discreet(grpc.ServerInterceptor):
    """Ends a failed call with a code; gRPC itself would send the text of the exception."""

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        """Return the handler of a call, changed so that a failure sends only a code."""
        handler = continuation(details)
        if handler is None:
            return None
        coding = (handler.request_deserializer, handler.response_serializer)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(_stream(handler.unary_stream), *coding)
        return grpc.unary_unary_rpc_method_handler(_single(handler.unary_unary), *coding)


def _single(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    def answer(request: Any, context: grpc.ServicerContext) -> Any:
        with _discretion(context):
            return behaviour(request, context)

    return answer


def _stream(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    def answer(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        with _discretion(context):
            yield from behaviour(request, context)

    return answer


@contextmanager
def _discretion(context: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if context.code() is None:  # otherwise the handler ended the call on purpose
            log.error("a call failed: %s", type(error).__name__)
            context.abort(grpc.StatusCode.INTERNAL, "fault")
        raise


def _listen(server: grpc.Server, path: Path) -> grpc.Server:
    if len(str(path)) > LONGEST:
        raise InputError(
            f"{path} is too long for a socket ({LONGEST} bytes at most)",
            hint="put the coordinator's folder at a shorter path",
        )
    path.unlink(missing_ok=True)
    server.add_insecure_port(f"unix:{path}")
    server.start()
    path.chmod(0o600)
    return server
