"""The coordinator's gRPC services on two sockets: one behind nginx for sites, one for operators.

Sockets are files in a folder of mode 0700: who can open them is this user, and nginx runs as it.
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from fedgraft.common.blobs import BlobStore
from fedgraft.common.channels import SERVER_OPTIONS
from fedgraft.common.errors import FedgraftError, InputError
from fedgraft.common.rpc import fedgraft_v1_pb2 as pb
from fedgraft.common.rpc import fedgraft_v1_pb2_grpc as services
from fedgraft.server.backbone_service import BackboneService
from fedgraft.server.enrollment import Enrolment, Membership

__all__ = ["Operator", "serve_operators", "serve_sites"]

THREADS = 16
LONGEST = 107  # bytes of a socket's path, unix(7)
Event = Callable[..., None]


class Operator(services.OperatorServicer):
    """What `fedgraft submit` and `fedgraft coordinator status|stop` ask."""

    def __init__(
        self,
        submit: Callable[[str], str],
        status: Callable[[], dict[str, Any]],
        stop: Callable[[str], None],
    ) -> None:
        self._submit, self._status, self._stop = submit, status, stop

    def Submit(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Take a job; the name of its run."""
        return pb.SubmitReply(run=_answered(context, self._submit, request.job))

    def Status(self, request: Any, context: grpc.ServicerContext) -> Any:
        """How everything is."""
        return pb.StatusReply(status=json.dumps(_answered(context, self._status)))

    def Stop(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Stop a run, or the coordinator."""
        _answered(context, self._stop, request.run)
        return pb.StopReply()


def _answered(context: grpc.ServicerContext, call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except FedgraftError as error:  # the operator is on this host, and may read our words
        text = json.dumps({"error": str(error), "hint": error.hint, "code": error.exit_code})
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)


def serve_sites(home: Path, event: Event) -> grpc.Server:
    """Serve enrolment and membership on ``run/services.sock``."""
    server = grpc.server(ThreadPoolExecutor(THREADS, "sites"), options=SERVER_OPTIONS)
    services.add_EnrolmentServicer_to_server(Enrolment(home, event), server)
    services.add_MembershipServicer_to_server(Membership(home, event), server)
    backbones = BackboneService(BlobStore(home / "backbones"))
    services.add_BackbonesServicer_to_server(backbones, server)
    return _listen(server, home / "run" / "services.sock")


def serve_operators(home: Path, operator: Operator) -> grpc.Server:
    """Serve ``operator`` on ``run/operator.sock``."""
    server = grpc.server(ThreadPoolExecutor(2, "operators"), options=SERVER_OPTIONS)
    services.add_OperatorServicer_to_server(operator, server)
    return _listen(server, home / "run" / "operator.sock")


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
