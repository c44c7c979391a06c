"""gRPC between coordinator and sites: the opening of a channel, and the options of both ends."""

import grpc

__all__ = ["SERVER_OPTIONS", "open_channel"]

LARGEST_MESSAGE = 8_388_608  # bytes; above the largest manifest and the largest piece of a chunk
# A broken connection is detected within a minute, even at a site that only waits. A restarted
# coordinator is found within seconds.
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", LARGEST_MESSAGE),
    ("grpc.max_send_message_length", LARGEST_MESSAGE),
    ("grpc.keepalive_time_ms", 40_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 10_000),
    ("grpc.http2.lookahead_bytes", 4_194_304),
)
SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", LARGEST_MESSAGE),
    ("grpc.max_send_message_length", LARGEST_MESSAGE),
    ("grpc.http2.min_ping_interval_without_data_ms", 30_000),  # sites ping every 40 s
)


def open_channel(
    endpoint: str, ca: bytes = b"", key: bytes | None = None, certificate: bytes | None = None
) -> grpc.Channel:
    """Return a channel to ``HOST:PORT`` over mutual TLS, or to ``unix:PATH`` on this host.

    A channel to ``unix:PATH`` has no TLS. ``ca``, ``key`` and ``certificate`` are PEM. Without
    ``key`` and ``certificate`` the other side does not know the caller; only enrolment allows this.
    Nothing is sent before the first call.
    """
    if endpoint.startswith("unix:"):
        return grpc.insecure_channel(endpoint, CHANNEL_OPTIONS)
    credentials = grpc.ssl_channel_credentials(ca, key, certificate)
    return grpc.secure_channel(endpoint, credentials, CHANNEL_OPTIONS)
