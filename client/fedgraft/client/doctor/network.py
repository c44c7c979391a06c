"""The doctor's checks of the connection to the coordinator, layer by layer, and of the clock.

If gRPC goes through a proxy, a direct connection says nothing. The checks of those layers are then
skipped, and the coordinator's answer through the proxy counts.
"""

import os
import socket
import ssl
import statistics
import time
import urllib.request

import grpc

from fedgraft.client.doctor.local import FAIL, OK, SKIPPED, WARN, Finding, Patient
from fedgraft.client.membership.credentials import open_member_channel
from fedgraft.client.membership.state_files import CA
from fedgraft.common.rpc import fedgraft_v1_pb2 as pb
from fedgraft.common.rpc import fedgraft_v1_pb2_grpc as services

__all__ = ["clock", "coordinator", "latency", "name", "proxies", "tcp", "tls"]

AHEAD, BEHIND = 2.0, 60.0  # seconds that a site's clock may be off; Flower refuses more
PATIENCE = 10.0  # seconds
QUESTIONS = 5
SET_CLOCK = "set the clock: timedatectl set-ntp true (or: chronyc makestep)"
FOR_GRPC = ("grpc_proxy", "https_proxy", "http_proxy")  # as gRPC reads them: only in lower case
FOR_HTTPX = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "https_proxy", "http_proxy", "all_proxy")
# X509_V_ERR_* of OpenSSL, x509_vfy.h
NOT_YET, EXPIRED = 9, 10
HOST, ADDRESS = 62, 64
OTHER_CA = frozenset({2, 7, 18, 19, 20, 21, 30})  # the issuer is not pinned, or did not sign it


def name(patient: Patient) -> Finding:
    """Check that the coordinator's name resolves."""
    host, port = patient.address
    if _proxied(host):
        return Finding("name", SKIPPED, "a proxy resolves it")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        hint = "ask your network's people for DNS, or the coordinator whether the name is right"
        return Finding("name", FAIL, f"{host} does not resolve here", hint)
    addresses = dict.fromkeys(str(one[4][0]) for one in found)
    return Finding("name", OK, f"{host} is {', '.join(addresses)}")


def tcp(patient: Patient) -> Finding:
    """Check that the port accepts a connection."""
    host, port = patient.address
    if _proxied(host):
        return Finding("tcp", SKIPPED, "goes through a proxy")
    try:
        with socket.create_connection((host, port), PATIENCE):
            return Finding("tcp", OK, f"{host} port {port} is open")
    except ConnectionRefusedError:
        hint = "is the coordinator up? ask them; or a firewall refuses"
        return Finding("tcp", FAIL, f"{host} refuses port {port}", hint)
    except OSError as error:
        what = f"{host} port {port} cannot be reached ({type(error).__name__})"
        return Finding("tcp", FAIL, what, f"have outgoing TCP to {host} port {port} let through")


def tls(patient: Patient) -> Finding:
    """Check the coordinator's certificate: by the pinned CA, for its name, valid today."""
    host, port = patient.address
    if _proxied(host):
        return Finding("tls", SKIPPED, "goes through a proxy")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # the next check uses our certificate
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cafile=patient.state / CA)
    except (OSError, ssl.SSLError):
        return Finding("tls", FAIL, f"{CA} is missing or damaged", patient.new_kit)
    try:
        with (
            socket.create_connection((host, port), PATIENCE) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            return Finding("tls", OK, f"{secured.version()}, certificate by the federation's CA")
    except ssl.SSLCertVerificationError as error:
        return Finding("tls", FAIL, *_distrust(error, host))
    except (ssl.SSLError, OSError) as error:
        what = f"no TLS on port {port} ({type(error).__name__})"
        return Finding("tls", FAIL, what, "is it the coordinator's port? does a proxy cut in?")


def _distrust(error: ssl.SSLCertVerificationError, host: str) -> tuple[str, str]:
    """Return the reason why the coordinator's certificate is refused, and a hint."""
    code = error.verify_code
    if code in OTHER_CA:
        hint = "a proxy opens TLS (have it leave this host alone), or it is another coordinator"
        return "wrong CA: the certificate is not by the federation's", hint
    if code == EXPIRED:
        hint = "if this clock is right, the coordinator must renew its certificate"
        return "expired: the coordinator's certificate", hint
    if code == NOT_YET:
        return "not valid yet: the coordinator's certificate", SET_CLOCK
    if code in (HOST, ADDRESS):
        hint = "ask the coordinator for its endpoint; it must be the host of federation.toml"
        return f"host name: the certificate is not for {host}", hint
    return f"certificate refused: {error.verify_message}", "tell the coordinator"


def coordinator(patient: Patient) -> Finding:
    """Check that the coordinator accepts our certificate: it answers a request only for members."""
    state, member = patient.state, patient.member
    with open_member_channel(state, member.endpoint) as channel:
        stub = services.MembershipStub(channel)
        try:
            stub.GetTime(pb.TimeRequest(), timeout=PATIENCE)  # connects
            for _ in range(QUESTIONS):
                began, before = time.time(), time.perf_counter()
                said = stub.GetTime(pb.TimeRequest(), timeout=PATIENCE).unix_seconds
                trip = time.perf_counter() - before
                patient.answers.append((began + trip / 2 - said, trip))
        except grpc.RpcError as error:
            return Finding("coordinator", FAIL, *_refusal(error, patient.new_kit))
    return Finding("coordinator", OK, f"takes the certificate of {member.site}")


def _refusal(error: grpc.RpcError, new_kit: str) -> tuple[str, str]:
    """Return the meaning of a refused GetTime, and a hint.

    nginx answers HTTP 400 to a certificate that it does not accept.
    """
    status = error.code()
    denied = status in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
    if denied or (status == grpc.StatusCode.INTERNAL and "400" in str(error.details())):
        return "certificate revoked or unknown", new_kit
    if status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        hint = "does something between let TLS through but not HTTP/2? is the coordinator up?"
        return f"no answer ({status.name.lower()})", hint
    return f"it refuses: {status.name.lower()}", "tell the coordinator"


def clock(patient: Patient) -> Finding:
    """Compare this clock with the coordinator's, by the quickest of the answers."""
    off, trip = min(patient.answers, key=lambda one: one[1])
    side = "ahead of" if off > 0 else "behind"
    what = f"{abs(off):.1f} s {side} the coordinator's (± {trip / 2:.2f} s)"
    if -BEHIND <= off <= AHEAD:
        return Finding("clock", OK, what)
    hint = f"{SET_CLOCK}; if this one is right, tell the coordinator"
    return Finding("clock", FAIL, what, hint)


def latency(patient: Patient) -> Finding:
    """Report the measured round trip."""
    trips = [1000 * trip for _, trip in patient.answers]
    what = f"{statistics.median(trips):.1f} ms there and back"
    return Finding("latency", OK, f"{what} ({min(trips):.1f} to {max(trips):.1f}, {len(trips)}x)")


def proxies(patient: Patient) -> Finding:
    """Report proxies in the environment: only variable names, as values may hold passwords."""
    found = [one for one in dict.fromkeys((*FOR_GRPC, *FOR_HTTPX)) if os.environ.get(one)]
    if not found:
        return Finding("proxies", OK, "none in the environment")
    try:
        host = patient.address[0]
    except Exception:  # another check reports this error
        host = ""
    what = ", ".join(found)
    if host and urllib.request.proxy_bypass(host):
        return Finding("proxies", OK, f"{what}; no_proxy leaves {host} out")
    hint = f"export no_proxy={host or 'HOST'} if it can be reached without"
    if not any(one in FOR_GRPC for one in found):
        hint += "; else set https_proxy too: gRPC reads only lower case"
    return Finding("proxies", WARN, f"{what} set: connections to {host or 'it'} go there", hint)


def _proxied(host: str) -> bool:
    """Return whether gRPC would go through a proxy to ``host``."""
    there = any(os.environ.get(one) for one in FOR_GRPC)
    return there and not urllib.request.proxy_bypass(host)
