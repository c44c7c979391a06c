"""Join a federation with a kit. The keys are made here, and only public keys leave."""

import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fedgraft.client.membership.credentials import (
    Membership,
    ask,
    keep_membership,
    load_tls_key,
    set_aside,
)
from fedgraft.client.membership.identity import make_identity
from fedgraft.client.membership.roster import Trust, accept, keep_roster
from fedgraft.client.membership.state_files import CA, CERTIFICATE, MEMBERSHIP, TLS_KEY
from fedgraft.common.errors import InputError
from fedgraft.common.federation.certificates import (
    fingerprint,
    key_to_pem,
    make_csr,
    make_key,
    site_of,
)
from fedgraft.common.federation.kit import Kit, enrolment_statement
from fedgraft.common.files import write_private, write_text
from fedgraft.common.messages.grpc_channel import open_channel
from fedgraft.common.rpc import fedgraft_v1_pb2 as pb
from fedgraft.common.rpc import fedgraft_v1_pb2_grpc as services

__all__ = ["Joined", "join"]


@dataclass(frozen=True)
class Joined:
    """The result of joining; ``strangers`` are sites in the roster that the kit does not name."""

    membership: Membership
    strangers: list[str]


def join(kit: Kit, state: Path, now: datetime) -> Joined:
    """Make keys here, have the coordinator certify them, and keep the coordinator's answer.

    If joining fails, only the keys are left, and the next try uses them. If a try is interrupted
    after the coordinator has answered, the kit is used up: the coordinator must renew it.

    Raises:
        FedgraftError: the coordinator cannot be reached, or refuses.
        InputError: the site has joined already, or the coordinator's answer is not for us.
    """
    if (state / MEMBERSHIP).exists():
        hint = f"to join again with a new kit: {set_aside(state)}"
        raise InputError("this site has joined already", hint=hint)
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.chmod(state, 0o700)
        identity = make_identity(state)
        if not (state / TLS_KEY).exists():
            write_private(state / TLS_KEY, key_to_pem(make_key()))
    except OSError as error:
        raise InputError(
            f"{state} cannot be written: {error.strerror}", hint="check the folder"
        ) from None
    key = load_tls_key(state)
    csr = make_csr(key, kit.site)
    request = pb.EnrolRequest(
        site=kit.site,
        token=kit.token,
        csr=csr,
        identity=identity.public,
        proof=identity.sign(enrolment_statement(kit.site, csr)),
    )
    ca = kit.ca.encode()
    with open_channel(kit.endpoint, ca=ca) as channel:
        reply = ask(services.EnrolmentStub(channel).Enrol, request)
    if site_of(reply.certificate, ca, key.public_key(), now) != kit.site:
        raise InputError("the certificate is for another site", hint="tell the coordinator")
    trust = Trust(kit.site, identity.public.hex(), kit.sites, {}, kit.floor)
    federation, strangers = accept(reply.roster, trust)
    write_text(state / CA, kit.ca)
    write_text(state / CERTIFICATE, reply.certificate.decode())
    keep_roster(state, federation)
    member = Membership(kit.federation, kit.site, kit.endpoint, fingerprint(ca), kit.sites)
    keep_membership(state, member)  # last: the site has then joined
    return Joined(member, strangers)
