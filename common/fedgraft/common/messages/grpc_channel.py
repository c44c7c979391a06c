"""gRPC between coordinator and sites: how a channel is opened, and the options of both ends."""

import grpc

__all__ = ["SERVER_OPTIONS", "open_channel"]

LARGEST_MESSAGE = 8_388_608  # bytes; above the largest manifest and the largest piece of a chunk
# A dead line is noticed within a minute, also by a site that only waits; a coordinator that starts
# again is found within seconds.
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
    ("grpc.http2.min_ping_interval_without_data_ms", 30_000),  # sites ask every 40 s
)


def open_channel(
    endpoint: str, ca: bytes = b"", key: bytes | None = None, certificate: bytes | None = None
) -> grpc.Channel:
    """A channel to ``HOST:PORT`` over mutual TLS, or to ``unix:PATH`` on this host without.

    All three are PEM; without ``key`` and ``certificate`` the other side does not learn who calls,
    which only enrolment allows. Nothing is sent before the first call.
    """
    if endpoint.startswith("unix:"):
        return grpc.insecure_channel(endpoint, CHANNEL_OPTIONS)
    credentials = grpc.ssl_channel_credentials(ca, key, certificate)
    return grpc.secure_channel(endpoint, credentials, CHANNEL_OPTIONS)
