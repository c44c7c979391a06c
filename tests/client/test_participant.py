"""A site agrees only to what it has, trains as it is asked, and keeps its own head to itself."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedgraft.client.evaluation import evaluate
from fedgraft.client.participant import NOTHING, Participant, Splits, open_participant
from fedgraft.client.training import Span, train
from fedgraft.common.adapters import Vector, is_head, read
from fedgraft.common.errors import AdapterError, SiteFailure
from fedgraft.common.job import Job
from fedgraft.common.jobfile import parse_job
from fedgraft.common.messages import encode
from fedgraft.common.payloads import EvaluateRequest, PlanRequest, TrainReply, TrainRequest
from fedgraft.common.seeds import torch_generator
from fedgraft.common.workbench import Workbench, open_workbench
from fedgraft.server.rounds import Plan, make_plan
from fedgraft.simulations.demo import digits

SESSION = "0123456789abcdef" * 2


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_job(*, rule: str = "fedavg", head: str = "shared", **training: Any) -> Job:
    raw = {
        "job": {"name": "t", "task": "image-classification", "labels": list(digits.NAMES)},
        "backbone": {"source": "builtin:glyph-vit"},
        "method": {"kind": "lora", "rank": 2, "targets": ["q_proj"], "head": head},
        "training": {"batch_size": 16, **training},
        "rounds": {"count": 4},
        "aggregation": {"rule": rule},
        "data": {"validation": 0.25, "normalize": "per-image"},
    }
    return parse_job(raw, where="test")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 80 digits to train on and 30 to test on."""
    folder = tmp_path_factory.mktemp("rows")
    train_rows, test_rows = digits.load()
    train_rows.select(range(80)).to_parquet(folder / "train.parquet")
    test_rows.select(range(30)).to_parquet(folder / "test.parquet")
    return folder


class Place:
    """One site and a coordinator's plan for it."""

    def __init__(self, rows: Path, folder: Path, job: Job, name: str = "st-mary") -> None:
        folder.mkdir(exist_ok=True)
        self.path, self.state = folder / f"{name}.toml", folder / "state"
        data = f'train = "{rows}/train.parquet"\ntest = "{rows}/test.parquet"\n'
        self.path.write_text(f'name = "{name}"\ndevice = "cpu"\n[data]\n{data}')
        self.job = job
        self.bench: Workbench = open_workbench(job)
        self.plan: Plan = make_plan(job, self.bench, SESSION)

    def site(self) -> Participant:
        """As after a restart: nothing of it is remembered in the object."""
        return open_participant({"site": str(self.path), "state": str(self.state)})

    def adapter(self, seed: int = 0) -> Vector:
        start = self.bench.initial_of(self.plan.exchanged)
        noise = np.random.default_rng(seed).normal(0, 0.02, start.shape)
        return (start + noise).astype(np.float32)

    def training(self, number: int = 1, *, seed: int = 0, session: str = SESSION) -> TrainRequest:
        names = self.plan.exchanged.names
        return TrainRequest(session, number, 0, self.plan.request.job, names, self.adapter(seed))

    def evaluating(self, number: int = 1, *, split: str = "test") -> EvaluateRequest:
        names, text = self.plan.exchanged.names, self.plan.request.job
        return EvaluateRequest(SESSION, number, text, names, split, self.adapter())


@pytest.fixture
def place(rows: Path, tmp_path: Path) -> Place:
    return Place(rows, tmp_path, make_job())


@pytest.fixture
def private(rows: Path, tmp_path: Path) -> Place:
    """A site whose head is its own."""
    return Place(rows, tmp_path, make_job(head="local"))


def wire(reply: TrainReply) -> bytes:
    """The reply as it travels."""
    return b"".join(record.deflate() for record in encode(reply).values())


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
    class Empty(Participant):
        def splits(self, job: Job) -> Splits:
            whole = super().splits(job)
            return replace(whole, train=whole.train.subset(NOTHING))

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
        getattr(private.site(), verb)(replace(requests[verb], session=session))
    assert caught.value.code == "bad-session"
    assert not private.state.exists()


# Training


@pytest.mark.parametrize("rule", ["fedavg", "ffa"])
def test_an_update_is_that_of_training_here(rule: str, rows: Path, tmp_path: Path) -> None:
    place = Place(rows, tmp_path, make_job(rule=rule, epochs=2))
    request = place.training(3)
    reply = place.site().train(request)
    bench, exchanged = place.bench, place.plan.exchanged
    bench.put((exchanged, request.adapter))
    result = train(
        bench.model,
        exchanged.names,
        place.site().splits(place.job).train,
        settings=place.job.training,
        generator=torch_generator(place.job.job.seed, "train", 3, "st-mary"),
        span=Span(2 / 4, 3 / 4),
    )
    assert reply.update.tobytes() == (read(bench.model, exchanged) - request.adapter).tobytes()
    assert np.abs(reply.update).max() > 0
    assert (reply.session, reply.round, reply.layout) == (SESSION, 3, exchanged.fingerprint)
    assert (reply.examples, reply.loss) == (60, result.loss)
    assert reply.update.dtype == np.float32


@pytest.mark.parametrize("head", ["shared", "local"])
def test_a_repeated_request_gets_the_same_bytes(head: str, rows: Path, tmp_path: Path) -> None:
    place = Place(rows, tmp_path, make_job(head=head))
    first = place.site().train(place.training(1))
    place.site().evaluate(place.evaluating(1))
    again = place.site().train(place.training(1))
    assert wire(first) == wire(again)


def test_requests_do_not_leak_into_each_other(rows: Path, tmp_path: Path) -> None:
    # One workbench serves every site of a simulation in turn; A is fixed here and never sent.
    place = Place(rows, tmp_path, make_job(rule="ffa"))
    first = place.site().train(place.training(1))
    place.bench.put((place.bench.layout, place.bench.initial + np.float32(1)))
    assert wire(place.site().train(place.training(1))) == wire(first)


def test_batches_differ_between_rounds_and_between_sites(rows: Path, tmp_path: Path) -> None:
    job = make_job()
    here, there = Place(rows, tmp_path, job), Place(rows, tmp_path, job, name="st-john")
    updates = {
        here.site().train(here.training(1)).update.tobytes(),
        here.site().train(here.training(2)).update.tobytes(),
        there.site().train(there.training(1)).update.tobytes(),
    }
    assert len(updates) == 3


def test_a_site_without_a_local_head_keeps_nothing(place: Place) -> None:
    place.site().train(place.training(1))
    assert not place.state.exists()


# Evaluation


@pytest.mark.parametrize(("split", "count"), [("validation", 20), ("test", 30)])
def test_a_tally_is_that_of_evaluating_here(place: Place, split: str, count: int) -> None:
    request = place.evaluating(2, split=split)
    reply = place.site().evaluate(request)
    place.bench.put((place.plan.exchanged, request.adapter))
    examples = getattr(place.site().splits(place.job), split)
    tally = evaluate(place.bench.model, examples, classes=10).tally
    assert reply.tally.tolist() == tally.to_vector().tolist()
    assert reply.tally[1:].sum() == count
    assert (reply.session, reply.round) == (SESSION, 2)


@pytest.mark.parametrize("split", ["train", "", "../test", "nothing"])
def test_no_other_split_is_evaluated(place: Place, split: str) -> None:
    with pytest.raises(SiteFailure) as caught:
        place.site().evaluate(place.evaluating(split=split))
    assert caught.value.code == "no-examples"


def test_validation_is_held_out_of_training(place: Place) -> None:
    splits = place.site().splits(place.job)
    every = np.arange(len(splits.train)), np.arange(len(splits.validation))
    kept, held = (
        {row.numpy().tobytes() for row in part.batch(index)["pixel_values"]}
        for part, index in zip((splits.train, splits.validation), every, strict=True)
    )
    assert (len(kept), len(held)) == (60, 20)
    assert not kept & held


# A head of one's own


def heads(place: Place) -> list[str]:
    return sorted(path.name for path in (place.state / SESSION).iterdir())


def test_a_local_head_stays_at_the_site(private: Place) -> None:
    reply = private.site().train(private.training(1))
    assert not any(map(is_head, private.plan.exchanged.names))
    assert reply.update.shape == (private.plan.exchanged.size,)
    assert reply.layout == private.plan.exchanged.fingerprint
    head = read(private.bench.model, private.bench.local)
    assert not np.array_equal(head, private.bench.initial_of(private.bench.local))
    assert heads(private) == ["000001.safetensors"]
    # Not even as bytes of something else.
    sent = wire(reply)
    assert not any(head[at : at + 4].tobytes() in sent for at in range(0, len(head) - 4, 4))


def _continued(place: Place, number: int, head: Vector | None) -> bytes:
    """The update of a round that starts from this head, trained directly."""
    request, bench = place.training(number), place.bench
    own = [] if head is None else [(bench.local, head)]
    bench.put(*own, (place.plan.exchanged, request.adapter))
    train(
        bench.model,
        (*place.plan.exchanged.names, *bench.local.names),
        place.site().splits(place.job).train,
        settings=place.job.training,
        generator=torch_generator(place.job.job.seed, "train", number, "st-mary"),
        span=Span((number - 1) / 4, number / 4),
    )
    update: Vector = read(bench.model, place.plan.exchanged) - request.adapter
    return update.tobytes()


def test_a_local_head_goes_on_from_the_round_before(private: Place) -> None:
    first = private.site().train(private.training(1))
    head = read(private.bench.model, private.bench.local)
    second = private.site().train(private.training(2))
    assert first.update.tobytes() == _continued(private, 1, None)
    assert second.update.tobytes() == _continued(private, 2, head)
    assert second.update.tobytes() != _continued(private, 2, None)


def test_a_round_that_is_repeated_starts_from_the_same_head(private: Place) -> None:
    replies = {number: private.site().train(private.training(number)) for number in (1, 2, 3)}
    again = private.site().train(private.training(3))
    assert wire(again) == wire(replies[3])
    assert heads(private) == ["000001.safetensors", "000002.safetensors", "000003.safetensors"]
    # a coordinator whose last checkpoint is damaged goes back one more
    again = private.site().train(private.training(2))
    assert wire(again) == wire(replies[2])


def test_a_site_that_was_not_asked_for_rounds_goes_on_from_its_last(private: Place) -> None:
    private.site().train(private.training(1))
    head = read(private.bench.model, private.bench.local)
    reply = private.site().train(private.training(4))
    assert reply.update.tobytes() == _continued(private, 4, head)


def test_only_the_last_three_heads_are_kept(private: Place) -> None:
    for number in (1, 2, 3, 4):
        private.site().train(private.training(number))
    assert heads(private) == ["000002.safetensors", "000003.safetensors", "000004.safetensors"]


def test_a_head_that_is_no_longer_kept_is_not_replaced_by_a_fresh_one(private: Place) -> None:
    for number in (1, 2, 3, 4):
        private.site().train(private.training(number))
    with pytest.raises(SiteFailure, match="head-lost"):
        private.site().train(private.training(2))


def test_evaluation_uses_the_head_of_its_round(private: Place) -> None:
    kept = []
    for number in (1, 2):
        private.site().train(private.training(number))
        kept.append(read(private.bench.model, private.bench.local))
    splits = private.site().splits(private.job)
    for number, head in enumerate(kept, 1):
        request = private.evaluating(number)
        tally = private.site().evaluate(request).tally
        private.bench.put((private.bench.local, head), (private.plan.exchanged, request.adapter))
        wanted = evaluate(private.bench.model, splits.test, classes=10).tally
        assert tally.tolist() == wanted.to_vector().tolist()
    assert not np.array_equal(kept[0], kept[1])


def test_sessions_do_not_share_a_head(private: Place) -> None:
    private.site().train(private.training(1))
    private.site().train(private.training(2))
    other = private.training(2, session="f" * 32)
    assert private.site().train(other).update.tobytes() == _continued(private, 2, None)
    assert sorted(path.name for path in private.state.iterdir()) == [SESSION, "f" * 32]


# Opening


def test_a_node_may_say_where_state_is_kept_and_on_what_to_compute(
    place: Place, tmp_path: Path
) -> None:
    site = open_participant({"site": str(place.path), "state": "/elsewhere", "device": "cpu"})
    assert (str(site.state), site.device, site.config.name) == ("/elsewhere", "cpu", "st-mary")
    site = open_participant({"site": str(place.path)})
    assert site.state == tmp_path / "state"
