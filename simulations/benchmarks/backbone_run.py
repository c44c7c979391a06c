"""The two ends of the backbone benchmark, each a process of its own: see ``backbone.py``.

    python simulations/benchmarks/backbone_run.py serve STORE SOCKET
    python simulations/benchmarks/backbone_run.py fetch ENDPOINT TLS DIGEST STORE

``fetch`` says ``ready``, waits for a line, and prints one line of JSON when the backbone is stored.
"""

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from fedgraft.client.membership.backbone_client import fetch_backbone
from fedgraft.common.backbones.blob_store import BlobStore
from fedgraft.common.messages.grpc_channel import SERVER_OPTIONS, open_channel
from fedgraft.common.rpc.fedgraft_v1_pb2_grpc import add_BackbonesServicer_to_server
from fedgraft.server.enrollment.backbone_service import BackboneService


def serve(store: Path, socket: Path) -> None:
    """Hand out what is in ``store`` until stdin closes."""
    server = grpc.server(ThreadPoolExecutor(16), options=SERVER_OPTIONS)
    add_BackbonesServicer_to_server(BackboneService(BlobStore(store)), server)
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    print("ready", flush=True)
    sys.stdin.read()
    server.stop(0)


def fetch(endpoint: str, tls: Path, digest: str, store: Path) -> None:
    """Fetch one backbone into ``store``."""
    pem = [(tls / name).read_bytes() for name in ("ca.pem", "site.key", "site.pem")]
    seen: list[int] = []
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    with open_channel(endpoint, *pem) as channel:
        fetch_backbone(
            channel, digest, BlobStore(store), progress=lambda done, _: seen.append(done)
        )
    print(json.dumps({"seconds": time.perf_counter() - started, "chunks": len(seen)}), flush=True)


def main() -> None:
    """Be the end that the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ends = parser.add_subparsers(dest="end", required=True)
    server = ends.add_parser("serve")
    server.add_argument("store", type=Path)
    server.add_argument("socket", type=Path)
    site = ends.add_parser("fetch")
    site.add_argument("endpoint")
    site.add_argument("tls", type=Path)
    site.add_argument("digest")
    site.add_argument("store", type=Path)
    options = parser.parse_args()
    if options.end == "serve":
        serve(options.store, options.socket)
    else:
        fetch(options.endpoint, options.tls, options.digest, options.store)


if __name__ == "__main__":
    main()
