"""The configuration of nginx, which serves the coordinator's only public port.

nginx uses TLS with the federation's certificate and asks for a client certificate. It passes on
the requests that sites need: Flower's Fleet API to the SuperLink, and our gRPC services to their
socket. A request to Flower must carry the node key that was enrolled with the certificate's name.
A request to register a node is never passed on. nginx refuses all other requests. It writes refused
requests to a log that the coordinator reads.
"""

import errno
import ipaddress
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedgraft.common.errors import InputError
from fedgraft.common.files import write_text

__all__ = [
    "ERRORS",
    "LOG",
    "NginxConfig",
    "addresses_for",
    "check_listen",
    "nginx_command",
    "write_nginx_config",
]

LOG, ERRORS = "refused.log", "error.log"
BODY = "16m"  # Flower's chunks are 5 MiB
RATE, BURST = 50, 200  # requests per second of one site; the stages of a round come in bursts


@dataclass(frozen=True)
class NginxConfig:
    """The settings of nginx; ``members`` maps a site's name to its node key (base64 of PEM).

    ``listen`` is ADDRESS:PORT, or several with spaces between.
    """

    home: Path
    listen: str
    superlink: int
    members: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """The folder of nginx's files."""
        return self.home / "nginx"


def addresses_for(host: str, port: int) -> str:
    """Return where to listen so that sites can dial ``host``: ADDRESS:PORT, two if it has both.

    That is IPv6 if ``host`` is an IPv6 address, and IPv4 and IPv6 if it is a name with both.
    """
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        try:
            found = {one[0] for one in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        except OSError:  # the name may be known to sites alone
            found = {socket.AF_INET}
        six = socket.AF_INET6 in found and _has_ipv6()
        return f"0.0.0.0:{port} [::]:{port}" if six else f"0.0.0.0:{port}"
    return f"[::]:{port}" if version == 6 else f"0.0.0.0:{port}"


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def check_listen(listen: str) -> str:
    """Check that nginx could listen on ``listen``: ADDRESS:PORT, or several with spaces between.

    A port in use is accepted: the process that uses it may be the nginx of a killed coordinator,
    which is about to end.

    Returns:
        Who uses the port, in words; empty if nobody does.

    Raises:
        InputError: an address has another form, or is not an address of this machine.
    """
    users = [used for address in listen.split() if (used := _user_of(address))]
    if not listen.split():
        raise InputError("nothing to listen on", hint="for example --listen 0.0.0.0:8443")
    return users[0] if users else ""


def _user_of(address: str) -> str:
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    try:
        socket.create_server((host.strip("[]"), int(port)), family=family).close()
        return ""
    except (OSError, OverflowError, ValueError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            return f"port {port} is in use by {_holder(int(port))}"
        why = getattr(error, "strerror", None) or "no ADDRESS:PORT"
        raise InputError(
            f"nothing can listen on {address}: {why}", hint="for example --listen 0.0.0.0:8443"
        ) from None


def _holder(port: int) -> str:
    """Return the process that listens on ``port``, by name and number, as far as it is shown."""
    import psutil

    try:
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr.port == port and one.pid:
                return f"{psutil.Process(one.pid).name()} (process {one.pid})"
    except (psutil.Error, OSError):
        pass
    return "a process that this user may not see"


def nginx_command(front: NginxConfig, nginx: str) -> list[str]:
    """Return the command that runs nginx in the foreground."""
    folder = front.folder
    return [nginx, "-p", str(folder), "-c", "nginx.conf", "-e", ERRORS, "-g", "daemon off;"]


def write_nginx_config(front: NginxConfig) -> None:
    """Write the configuration; nginx reads it at its start and on a reload (SIGHUP)."""
    front.folder.mkdir(exist_ok=True, mode=0o700)
    write_text(front.folder / "nginx.conf", _configuration(front))


def _configuration(front: NginxConfig) -> str:
    names = sorted(front.members)
    keys = "\n".join(f'    "CN={name} {front.members[name]}" {name};' for name in names)
    known = "\n".join(f'    "CN={name}" {name};' for name in names)
    listens = "\n".join(f"    listen {one} ssl http2;" for one in front.listen.split())
    user = "user root;\n" if os.geteuid() == 0 else ""  # only this user can open the sockets
    return f"""\
# Written by fedgraft; changes are lost.
{user}worker_processes auto;
worker_shutdown_timeout 20s;  # an open session of a revoked site ends by then
pid nginx.pid;
events {{ worker_connections 1024; }}
http {{
  map_hash_bucket_size 1024;
  log_format refused escape=json '{{"time":"$time_iso8601","status":$status,'
    '"site":"$ssl_client_s_dn","verify":"$ssl_client_verify","method":"$request_method",'
    '"path":"$uri","bytes":$request_length}}';
  map $status $is_refused {{ default 0; "~^[4]" 1; }}
  access_log {LOG} refused if=$is_refused;
  server_tokens off;
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi; scgi_temp_path scgi;

  # Who may be whom: a certificate with the key that was enrolled with it.
  map "$ssl_client_s_dn $http_flwr_public_key" $node_of {{
    default "";
{keys}
  }}
  map $ssl_client_s_dn $site {{
    default "";
{known}
  }}
  limit_req_zone $ssl_client_s_dn zone=site:1m rate={RATE}r/s;
  limit_req_zone $binary_remote_addr zone=stranger:1m rate=2r/s;
  limit_req_status 429;
  limit_req_log_level info;  # they are in the other log
  limit_conn_log_level info;
  limit_conn_status 429;
  limit_conn_zone $ssl_client_s_dn zone=open:1m;

  server {{
{listens}
    ssl_certificate {front.home}/server.pem;
    ssl_certificate_key {front.home}/server.key;
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_session_tickets off;
    ssl_session_cache none;  # each new connection shows its certificate again
    ssl_client_certificate {front.home}/ca.pem;
    ssl_crl {front.home}/crl.pem;
    ssl_verify_client optional;
    client_max_body_size {BODY};
    client_body_buffer_size 1m;
    client_body_timeout 30s;
    client_header_timeout 10s;
    keepalive_timeout 75s;
    http2_chunk_size 128k;  # of a backbone on its way out

    location = /v1/fleet/register-node {{ return 403; }}
    location = /v1/fleet/unregister-node {{ return 403; }}
    location /v1/fleet/ {{
      if ($ssl_client_verify != SUCCESS) {{ return 401; }}
      if ($node_of = "") {{ return 403; }}
      limit_req zone=site burst={BURST} nodelay;
      limit_conn open 64;
      proxy_pass https://superlink;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_ssl_trusted_certificate {front.home}/ca.pem;
      proxy_ssl_verify on;
      proxy_ssl_name localhost;
      proxy_ssl_session_reuse on;
      proxy_buffering off;
      proxy_read_timeout 120s;
    }}
    location = /fedgraft.v1.Enrolment/Enrol {{
      limit_req zone=stranger burst=10 nodelay;
      client_max_body_size 64k;
      grpc_set_header x-site "";
      grpc_pass grpc://services;
    }}
    location ~ ^/fedgraft\\.v1\\.(Backbones|Membership)/ {{
      if ($ssl_client_verify != SUCCESS) {{ return 401; }}
      if ($site = "") {{ return 403; }}
      limit_req zone=site burst={BURST} nodelay;
      limit_conn open 64;
      client_max_body_size 1m;
      grpc_set_header x-site $site;
      grpc_buffer_size 256k;
      grpc_read_timeout 600s;
      grpc_send_timeout 600s;
      grpc_pass grpc://services;
    }}
    location / {{ return 404; }}
  }}
  upstream superlink {{ server 127.0.0.1:{front.superlink}; keepalive 32; }}
  upstream services {{ server unix:{front.home}/run/services.sock; }}
}}
"""
