"""gRPC connections of fedgraft's own services: TLS with the federation's CA, or a local socket."""

import grpc

__all__ = ["open_channel"]

OPTIONS = [
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
]


def open_channel(
    endpoint: str, *, ca: bytes = b"", key: bytes | None = None, certificate: bytes | None = None
) -> grpc.Channel:
    """A channel to ``host:port`` that trusts ``ca`` alone, or to ``unix:PATH`` in clear.

    ``key`` and ``certificate`` (PEM) are what a member shows; without them only enrolment answers.
    """
    if endpoint.startswith("unix:"):
        # nginx and the operator's own commands share the socket's folder, which is theirs alone
        return grpc.insecure_channel(endpoint, [*OPTIONS, ("grpc.default_authority", "localhost")])
    return grpc.secure_channel(
        endpoint, grpc.ssl_channel_credentials(ca, key, certificate), OPTIONS
    )
