"""What attacks have in common: the honest way up to a stage, lies, and that nothing is left."""

from typing import Any

from secagg.federation import Federation

from fedgraft.client.secagg.masking_party import MaskingParty
from fedgraft.client.secagg.round_secrets import PartyState
from fedgraft.common.secagg.errors import SecAggError
from fedgraft.common.secagg.statements import Opening, RevealedShare
from fedgraft.server.protocol.unmasking_server import UnmaskingServer

__all__ = ["at", "lie", "openings", "wiped"]


def wiped(site: MaskingParty, error: SecAggError, kind: type[SecAggError]) -> None:
    """The site said no for this reason, and has nothing left to give."""
    assert type(error) is kind, error
    assert site.state is PartyState.IDLE
    assert site._round is None


def at(federation: Federation, stage: str) -> Any:
    """The honest request with which ``stage`` begins."""
    server = federation.open_server()
    answer = federation.advance(server, "keys", until=stage)
    return server.keys_request() if stage == "keys" else answer


def openings(federation: Federation, drops: dict[str, list[int]]) -> tuple[UnmaskingServer, Any]:
    """A round up to the openings, which a test may bend before it adds them."""
    server = federation.open_server()
    answer: Any = None
    federation.gone = set()
    for stage in ("keys", "shares", "train", "confirm"):
        answer = getattr(federation, f"do_{stage}")(server, answer, drops.get(stage, ()))
    return server, [federation.sites[site].unmask(answer) for site in federation.alive(())]


def lie(opening: Opening) -> Opening:
    return Opening(
        opening.site,
        tuple(
            RevealedShare(share.owner, bytes(b ^ 0x5A for b in share.share))
            for share in opening.shares
        ),
    )
