"""A site agrees only to what it has, and trains and evaluates as it is asked."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.places import SESSION, Place, make_job, wire, write_rows

from fedgraft.client.data import splits as splits_module
from fedgraft.client.data.batches import as_tensors
from fedgraft.client.data.rows import read_split
from fedgraft.client.data.splits import NOTHING, Splits
from fedgraft.client.participant import Participant, open_participant
from fedgraft.client.training.evaluate import measure
from fedgraft.client.training.trainer import train_together
from fedgraft.common.config.job import Job
from fedgraft.common.errors import AdapterError, SiteFailure
from fedgraft.common.examples import Examples
from fedgraft.common.layout import cut_rank
from fedgraft.common.messages.payloads import EvaluateRequest, PlanRequest, TrainRequest
from fedgraft.common.metrics.measures import LabelMeasures

KEPT, HELD = 68, 12  # of 80 rows at a share of 0.25: the hash of each row decides


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder)
    return folder


@pytest.fixture
def place(rows: Path, tmp_path: Path) -> Place:
    return Place(rows, tmp_path, make_job())


@pytest.fixture
def private(rows: Path, tmp_path: Path) -> Place:
    """A site whose head is its own."""
    return Place(rows, tmp_path, make_job(head="local"))


# Agreeing


@pytest.mark.parametrize("rule", ["fedavg", "ffa"])
@pytest.mark.parametrize("head", ["shared", "local", "frozen"])
def test_a_site_agrees_to_a_plan_it_can_follow(
    rule: str, head: str, rows: Path, tmp_path: Path
) -> None:
    place = Place(rows, tmp_path, make_job(rule=rule, head=head))
    reply = place.site().agree(place.plan.request)
    assert (reply.session, reply.site) == (SESSION, "st-mary")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"backbone": "f" * 64}, "backbone-differs"),
        ({"layout": "f" * 64}, "layout-differs"),
        ({"fixed": "f" * 64}, "fixed-differs"),
        ({"session": "../../etc"}, "bad-session"),
    ],
)
def test_a_site_refuses_what_differs(place: Place, changes: dict[str, str], code: str) -> None:
    request = replace(place.plan.request, **changes)  # type: ignore[arg-type]
    with pytest.raises(SiteFailure) as caught:
        place.site().agree(request)
    assert caught.value.code == code


def test_tensors_left_out_of_the_exchange_must_be_equal_everywhere(place: Place) -> None:
    # Fewer names than the plan has: their layout is right, but the rest is then fixed.
    names = place.plan.exchanged.names[1:]
    fewer = place.bench.layout.only(names)
    request = replace(place.plan.request, names=names, layout=fewer.fingerprint)
    with pytest.raises(SiteFailure) as caught:
        place.site().agree(request)
    assert caught.value.code == "fixed-differs"


def test_unknown_tensors_are_refused(place: Place) -> None:
    request = replace(place.plan.request, names=("base.other.weight",))
    with pytest.raises((SiteFailure, AdapterError)):
        place.site().agree(request)


def test_a_site_without_examples_refuses(place: Place) -> None:
    class Nothing(Splits):
        @property
        def train(self) -> Examples:
            return super().train.subset(NOTHING)

    class Empty(Participant):
        def splits(self, job: Job) -> Splits:
            return Nothing(self.config, job, self.store)

    site = place.site()
    with pytest.raises(SiteFailure) as caught:
        Empty(site.config, site.state).agree(place.plan.request)
    assert caught.value.code == "no-examples"


@pytest.mark.parametrize(
    "session",
    ["", "../../../etc/cron.d", "a" * 31, "a" * 33, "A" * 32, "g" * 32, "a" * 32 + "\n", "." * 32],
)
@pytest.mark.parametrize("verb", ["agree", "train", "evaluate"])
def test_a_session_that_could_name_another_folder_is_refused(
    private: Place, session: str, verb: str
) -> None:
    requests: dict[str, PlanRequest | TrainRequest | EvaluateRequest] = {
        "agree": private.plan.request,
        "train": private.training(),
        "evaluate": private.evaluating(),
    }
    with pytest.raises(SiteFailure) as caught:
        came = getattr(private.site(), verb)(replace(requests[verb], session=session))
        next(came)
    assert caught.value.code == "bad-session"
    assert not private.state.exists()


# Training


@pytest.mark.parametrize("rule", ["fedavg", "ffa"])
def test_an_update_is_that_of_training_here(rule: str, rows: Path, tmp_path: Path) -> None:
    place = Place(rows, tmp_path, make_job(rule=rule, epochs=2))
    reply, exchanged = place.train(3), place.plan.exchanged
    result = place.directly(3)
    assert reply.update.tobytes() == (result.vector - place.adapter()).tobytes()
    assert np.abs(reply.update).max() > 0
    assert (reply.session, reply.round, reply.layout) == (SESSION, 3, exchanged.fingerprint)
    assert (reply.examples, reply.loss) == (KEPT, result.loss)
    assert reply.update.dtype == np.float32


@pytest.mark.parametrize("head", ["shared", "local"])
def test_a_repeated_request_gets_the_same_bytes(head: str, rows: Path, tmp_path: Path) -> None:
    place = Place(rows, tmp_path, make_job(head=head))
    first = place.train(1)
    place.site().evaluate(place.evaluating(1))
    again = place.train(1)
    assert wire(first) == wire(again)


def test_requests_do_not_leak_into_each_other(rows: Path, tmp_path: Path) -> None:
    # One stack serves every site of a simulation in turn; A is fixed here and never sent.
    place = Place(rows, tmp_path, make_job(rule="ffa"))
    first = place.train(1)
    stack, layout = place.site().stack(place.job), place.bench.layout
    stack.put_one(layout, place.bench.initial + np.float32(1))
    place.bench.put((layout, place.bench.initial + np.float32(1)))
    assert wire(place.train(1)) == wire(first)
    place.bench.put()


def test_batches_differ_between_rounds_and_between_sites(rows: Path, tmp_path: Path) -> None:
    job = make_job()
    here, there = Place(rows, tmp_path, job), Place(rows, tmp_path, job, name="st-john")
    updates = {
        here.train(1).update.tobytes(),
        here.train(2).update.tobytes(),
        there.train(1).update.tobytes(),
    }
    assert len(updates) == 3


def test_a_site_without_a_local_head_keeps_nothing(place: Place) -> None:
    place.train(1)
    assert not place.state.exists()


# Evaluation


@pytest.mark.parametrize(("split", "count"), [("validation", HELD), ("test", 30)])
def test_a_tally_is_that_of_evaluating_here(place: Place, split: str, count: int) -> None:
    request = place.evaluating(2, split=split)
    reply = place.site().evaluate(request)
    examples = getattr(place.site().splits(place.job), split)
    stack, exchanged = place.site().stack(place.job), place.plan.exchanged
    tally = measure(stack, exchanged, request.adapter, examples, measures=LabelMeasures(10)).tally
    assert reply.tally.tolist() == tally.to_vector().tolist()
    assert reply.tally[1:].sum() == count
    assert (reply.session, reply.round) == (SESSION, 2)


def test_a_round_s_validation_does_not_read_the_test_file(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Splits, "test")
    assert place.site().evaluate(place.evaluating(2, split="validation")).round == 2


@pytest.mark.parametrize("split", ["train", "", "../test", "nothing"])
def test_no_other_split_is_evaluated(place: Place, split: str) -> None:
    with pytest.raises(SiteFailure) as caught:
        place.site().evaluate(place.evaluating(split=split))
    assert caught.value.code == "no-examples"


def test_validation_is_held_out_of_training(place: Place) -> None:
    splits = place.site().splits(place.job)
    every = np.arange(len(splits.train)), np.arange(len(splits.validation))
    kept, held = (
        {row.numpy().tobytes() for row in as_tensors(part.batch(index))["pixel_values"]}
        for part, index in zip((splits.train, splits.validation), every, strict=True)
    )
    assert (len(kept), len(held)) == (KEPT, HELD)
    assert not kept & held


# Reading


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read from here on."""
    files: list[str] = []
    reading = read_split

    def counted(path: str, *args: Any, **options: Any) -> Any:
        files.append(Path(path).stem)
        return reading(path, *args, **options)

    monkeypatch.setattr(splits_module, "read_split", counted)
    return files


def test_a_file_is_read_once_while_there_is_room(place: Place, read: list[str]) -> None:
    place.path.write_text(place.path.read_text() + "# another file, another key\n")
    node = {"site": str(place.path), "cache": '{"memory": "3MB"}'}  # a memory of its own
    for _ in range(2):
        splits = open_participant(node).splits(place.job)
        assert (len(splits.train), len(splits.validation)) == (KEPT, HELD)
    assert read == ["train"]  # what no training sees is not read for it
    assert len(splits.test) == 30
    rounds = place.job.rounds.model_copy(update={"count": 9})
    longer = place.job.model_copy(update={"rounds": rounds})
    again = open_participant(node).splits(longer)
    assert (len(again.train), len(again.test)) == (KEPT, 30)
    assert read == ["train", "test"]
    data = place.job.data.model_copy(update={"validation": 0.5})
    assert len(open_participant(node).splits(place.job.model_copy(update={"data": data})).train)
    assert read == ["train", "test", "train"]


def test_a_file_is_read_again_where_there_is_no_room(place: Place, read: list[str]) -> None:
    node = {"site": str(place.path), "cache": '{"memory": 0}'}
    for _ in range(2):
        splits = open_participant(node).splits(place.job)
        assert (len(splits.train), len(splits.test)) == (KEPT, 30)
    assert read == ["train", "test", "train", "test"]


# A rank of one's own


def test_a_site_of_lower_rank_trains_and_changes_only_that(rows: Path, tmp_path: Path) -> None:
    place = Place(rows, tmp_path, make_job())
    whole, exchanged, request = place.train(1).update, place.plan.exchanged, place.training(1)
    assert np.abs(whole - cut_rank(exchanged, whole, 1)).max() > 0
    own = tmp_path / "own.toml"
    own.write_text(f"rank = 1\n{place.path.read_text()}")
    for node in ({"site": str(place.path), "rank": "1"}, {"site": str(own)}):
        site = open_participant({**node, "state": str(place.state)})
        (reply,) = train_together([site.train(request)])
        assert reply.update.tobytes() == cut_rank(exchanged, reply.update, 1).tobytes()
        assert np.abs(reply.update).max() > 0
        start = site.start(place.bench, exchanged, request)
        assert start.tobytes() == cut_rank(exchanged, request.adapter, 1).tobytes()
        assert start.tobytes() != request.adapter.tobytes()


def test_evaluation_at_a_site_of_lower_rank_is_of_what_it_would_train(
    rows: Path, tmp_path: Path
) -> None:
    place = Place(rows, tmp_path, make_job())
    node = {"site": str(place.path), "state": str(place.state), "rank": "1"}
    request, exchanged = place.evaluating(2), place.plan.exchanged
    request = replace(request, adapter=place.adapter() * 3)
    tally = open_participant(node).evaluate(request).tally
    stack, examples = place.site().stack(place.job), place.site().splits(place.job).test
    cut = cut_rank(exchanged, request.adapter, 1)
    wanted = measure(stack, exchanged, cut, examples, measures=LabelMeasures(10)).tally
    assert tally.tolist() == wanted.to_vector().tolist()
    assert tally.tolist() != place.site().evaluate(request).tally.tolist()


# Opening


def test_a_node_may_say_where_state_is_kept_and_on_what_to_compute(
    place: Place, tmp_path: Path
) -> None:
    site = open_participant({"site": str(place.path), "state": "/elsewhere", "device": "cpu"})
    assert (str(site.state), site.device, site.config.name) == ("/elsewhere", "cpu", "st-mary")
    site = open_participant({"site": str(place.path)})
    assert site.state == tmp_path / "state"
