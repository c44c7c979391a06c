"""What a site keeps to itself, a head or factors B, stays there and goes on from round to round."""

from pathlib import Path

import numpy as np
import pytest
from support.places import SESSION, Place, make_job, wire, write_rows

from fedgraft.client.participant import FIRST
from fedgraft.client.training.evaluate import evaluate
from fedgraft.common.errors import SiteFailure
from fedgraft.common.layout import Vector
from fedgraft.common.metrics.evaluation import Measures


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder)
    return folder


@pytest.fixture(params=["head", "factors", "both"])
def private(request: pytest.FixtureRequest, rows: Path, tmp_path: Path) -> Place:
    """A site whose head is its own, or its factors B, or both."""
    own = {"head": {"head": "local"}, "factors": {"rule": "fedsa"}}
    chosen = own.get(request.param) or own["head"] | own["factors"]
    return Place(rows, tmp_path, make_job(**chosen))


def heads(place: Place) -> list[str]:
    return sorted(path.name for path in (place.state / SESSION).iterdir())


def test_a_local_head_stays_at_the_site(private: Place) -> None:
    reply = private.train(1)
    assert private.bench.own and not set(private.bench.own) & set(private.plan.exchanged.names)
    assert reply.update.shape == (private.plan.exchanged.size,)
    assert reply.layout == private.plan.exchanged.fingerprint
    head = private.kept(1)
    assert head.tobytes() == private.head(1).tobytes()
    assert not np.array_equal(head, private.bench.initial_of(private.bench.local))
    assert heads(private) == ["000001.safetensors"]
    # Not even as bytes of something else.
    sent = wire(reply)
    assert not any(head[at : at + 4].tobytes() in sent for at in range(0, len(head) - 4, 4))


def test_a_local_head_goes_on_from_the_round_before(private: Place) -> None:
    first, second = private.train(1), private.train(2)
    assert first.update.tobytes() == private.update(1).tobytes()
    assert second.update.tobytes() == private.update(2, private.head(1)).tobytes()
    assert second.update.tobytes() != private.update(2).tobytes()


def test_a_round_that_is_repeated_starts_from_the_same_head(private: Place) -> None:
    replies = {number: private.train(number) for number in (1, 2, 3)}
    assert wire(private.train(3)) == wire(replies[3])
    assert heads(private) == ["000001.safetensors", "000002.safetensors", "000003.safetensors"]
    # a coordinator whose last checkpoint is damaged goes back one more
    assert wire(private.train(2)) == wire(replies[2])


def test_a_site_that_was_not_asked_for_rounds_goes_on_from_its_last(private: Place) -> None:
    private.train(1)
    reply = private.train(4)
    assert reply.update.tobytes() == private.update(4, private.head(1)).tobytes()


def test_only_the_last_three_heads_are_kept(private: Place) -> None:
    for number in (1, 2, 3, 4):
        private.train(number)
    assert heads(private) == ["000002.safetensors", "000003.safetensors", "000004.safetensors"]


def test_a_head_that_is_no_longer_kept_is_not_replaced_by_a_fresh_one(private: Place) -> None:
    for number in (1, 2, 3, 4):
        private.train(number)
    with pytest.raises(SiteFailure, match="head-lost"):
        private.train(2)


def test_what_round_1_began_with_is_no_head(private: Place) -> None:
    (private.state / SESSION).mkdir(parents=True)
    (private.state / SESSION / FIRST).write_bytes(b"of a job that goes on from an earlier adapter")
    private.train(1)
    assert private.train(2).update.tobytes() == private.update(2, private.head(1)).tobytes()


def test_evaluation_uses_the_head_of_its_round(private: Place) -> None:
    kept: list[Vector] = []
    for number in (1, 2):
        private.train(number)
        kept.append(private.head(number, kept[-1] if kept else None))
    stack, examples = private.site().stack(private.job), private.site().splits(private.job).test
    layout = private.bench.layout
    for number, head in enumerate(kept, 1):
        request = private.evaluating(number)
        tally = private.site().evaluate(request).tally
        parts = (private.bench.local, head), (private.plan.exchanged, request.adapter)
        vector = layout.merged(private.bench.initial, *parts)
        wanted = evaluate(stack, layout, vector, examples, measures=Measures(10)).tally
        assert tally.tolist() == wanted.to_vector().tolist()
    assert not np.array_equal(kept[0], kept[1])


def test_sessions_do_not_share_a_head(private: Place) -> None:
    private.train(1)
    private.train(2)
    other = private.train(2, session="f" * 32)
    assert other.update.tobytes() == private.update(2).tobytes()
    assert sorted(path.name for path in private.state.iterdir()) == [SESSION, "f" * 32]
