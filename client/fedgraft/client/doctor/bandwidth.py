"""The doctor's check of the network rate: it fetches a part of a backbone and discards it.

The backbone is one that the policy allows, which a job would fetch in any case. Only the download
rate is measured; on many lines the upload is slower.
"""

import time
from collections.abc import Iterable
from pathlib import Path

import grpc

from fedgraft.client.doctor.local import OK, SKIPPED, Finding, Patient
from fedgraft.client.membership.credentials import open_member_channel
from fedgraft.client.membership.state_files import APPROVALS
from fedgraft.common.backbones.manifest import Manifest
from fedgraft.common.rpc import fedgraft_v1_pb2 as pb
from fedgraft.common.rpc.fedgraft_v1_pb2_grpc import BackbonesStub

__all__ = ["rate"]

ENOUGH = 16_000_000  # bytes
PATIENCE = 10.0  # seconds


def rate(patient: Patient) -> Finding:
    """Measure bytes per second from the coordinator, and the time of a round at that rate."""
    from fedgraft.client.policy.policy_file import load_policy

    policy = load_policy(Path(str(patient.config.policy)))
    digests = [one.removeprefix("sha256:") for one in policy.model.allowed_backbones.values()]
    try:
        with open_member_channel(patient.state, patient.member.endpoint) as channel:
            came, seconds = _measured(BackbonesStub(channel), digests)
    except grpc.RpcError as error:
        return Finding("rate", SKIPPED, f"not measured ({error.code().name.lower()})")
    if not came:
        what = "not measured: the coordinator has no backbone yet that the policy allows"
        return Finding("rate", SKIPPED, what)
    speed = came / seconds  # bytes a second
    leaves, about = _round(patient, policy.limits.max_bytes_out_per_round)
    what = f"{speed / 1e6:.1f} MB/s from the coordinator ({came / 1e6:.1f} MB in {seconds:.1f} s)"
    return Finding("rate", OK, f"{what}; {about}: {leaves / speed:.1f} s at this rate")


def _measured(stub: BackbonesStub, digests: Iterable[str]) -> tuple[int, float]:
    """Return bytes and seconds for the first backbone that the coordinator offers; 0 without."""
    for digest in digests:
        try:
            reply = stub.GetManifest(pb.ManifestRequest(digest=digest), timeout=PATIENCE)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                continue
            raise
        return _fetched(stub, digest, _first_chunks(Manifest.from_json(reply.manifest)))
    return 0, 0.0


def _first_chunks(manifest: Manifest) -> list[int]:
    """Return the indexes of the first chunks that together have ``ENOUGH`` bytes."""
    size, indexes = 0, []
    for index, chunk in enumerate(manifest.chunks):
        if size >= ENOUGH:
            break
        size += chunk.length
        indexes.append(index)
    return indexes


def _fetched(stub: BackbonesStub, digest: str, indexes: list[int]) -> tuple[int, float]:
    came, began = 0, time.perf_counter()
    stream = stub.GetChunks(pb.ChunksRequest(digest=digest, indexes=indexes), timeout=PATIENCE)
    try:
        for piece in stream:
            came += len(piece.data)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED or not came:
            raise
    return came, time.perf_counter() - began


def _round(patient: Patient, most: int) -> tuple[int, str]:
    """Return the bytes that leave in a round of the newest job, else the limit; with words."""
    from fedgraft.client.policy.approvals import Agreements
    from fedgraft.client.policy.disclosure import Disclosure

    newest = Agreements(patient.state / APPROVALS).newest()
    if newest is None:
        return most, f"the most that may leave in a round, {most / 1e6:g} MB"
    leaving = Disclosure(**newest.leaving)
    return leaving.bytes_per_round, f"in the newest job would leave {leaving.in_words()}"
