"""Both sides compute the same terms from the same things, and other terms from any other thing."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.matrix import tries

from fedgraft.common.config.job import Job
from fedgraft.common.layout import Layout
from fedgraft.common.messages.masked_terms import (
    describe,
    evaluation_terms,
    floor_for,
    hash_work,
    join_losses,
    split_loss,
    training_terms,
)
from fedgraft.common.messages.payloads import EvaluateRequest, TrainRequest, Work
from fedgraft.common.metrics.evaluation import TALLY_LIMIT
from fedgraft.common.secagg.errors import InputRefused, ParameterError
from fedgraft.common.secagg.quantize import LANES, Coding, encode_update, read_lanes
from fedgraft.common.secagg.transcript import Parameters, Policy, Roster, context_hash

SESSION = "0123456789abcdef" * 2
COHORT = (0, 2, 3, 5, 6)
LAYOUT = Layout(("a", "b"), ((2, 3), (4,)))
ROSTER = Roster(tuple(bytes([number]) * 32 for number in range(9)))
POLICY = Policy(1, 3, 24, 1.0)


def job(labels: tuple[str, ...] = ("yes", "no"), weights: str = "examples", **section: Any) -> Job:
    """A job with this ``[privacy.secure_aggregation]``."""
    return Job.model_validate(
        {
            "job": {"name": "tiny", "task": "text-classification", "labels": labels},
            "backbone": {"source": "builtin:glyph-vit"},
            "method": {"kind": "lora", "head": "shared"},
            "aggregation": {"weights": weights},
            "privacy": {"secure_aggregation": {"enabled": True, "max_sites": 10, **section}},
        }
    )


def train(
    settings: Job | None = None,
    session: str = SESSION,
    cohort: tuple[int, ...] = COHORT,
    layout: Layout = LAYOUT,
) -> Parameters:
    return training_terms(settings or job(), session, cohort, layout)


def evaluate(
    settings: Job | None = None, session: str = SESSION, cohort: tuple[int, ...] = COHORT
) -> Parameters:
    return evaluation_terms(settings or job(), session, cohort)


def context(parameters: Parameters, roster: Roster = ROSTER, policy: Policy = POLICY) -> bytes:
    return context_hash(parameters, roster, policy)


# What the terms are


def test_training_terms_describe_the_adapter_and_the_jobs_coding() -> None:
    terms = train(job(clip=0.25, max_weight=300, colluders=0.4))
    assert terms.session == bytes.fromhex(SESSION)
    assert terms.cohort == COHORT
    assert terms.layout.hex() == LAYOUT.fingerprint
    assert terms.length == LAYOUT.size == 10
    assert (terms.colluders, terms.dropouts) == (2, 1)
    assert (terms.coding.parties, terms.coding.clip, terms.coding.max_weight) == (10, 0.25, 300)


def test_in_a_uniform_mean_every_site_weighs_one() -> None:
    assert train(job(weights="uniform", max_weight=300)).coding.max_weight == 1


def test_evaluation_terms_describe_a_confusion_matrix_of_counts() -> None:
    terms = evaluate(job(labels=("a", "b", "c")))
    assert terms.length == 9
    assert terms.cohort == COHORT
    assert (terms.coding.ring_bits, terms.coding.max_weight) == (32, 1)
    assert terms.coding.clip == terms.coding.levels
    assert terms.coding.metric_limit == TALLY_LIMIT


def test_training_and_evaluation_never_have_the_same_terms() -> None:
    """Not even where the two vectors are equally long: else one could be opened as the other."""
    four = Layout(("a",), ((4,),))
    trained, evaluated = train(layout=four), evaluate()
    assert trained.length == evaluated.length == 4
    assert trained.layout != evaluated.layout
    assert context(trained) != context(evaluated)


# Both sides compute the same


def at_the_site(settings: Job) -> Job:
    """The job as it comes out of a message."""
    return Job.model_validate_json(settings.for_sites().model_dump_json())


@given(
    st.floats(1e-6, 10.0),
    st.floats(0, 0.49),
    st.floats(0, 0.49),
    st.integers(6, 500),
    st.integers(1, 10**6),
    st.sampled_from(["examples", "uniform"]),
)
@settings(deadline=None)
def test_a_site_and_the_coordinator_agree(
    clip: float, colluders: float, dropouts: float, sites: int, weight: int, weights: str
) -> None:
    section: dict[str, Any] = {"clip": clip, "colluders": colluders, "dropouts": dropouts}
    ours = job(weights=weights, max_sites=sites, max_weight=weight, **section)
    theirs = at_the_site(ours)
    same_layout = Layout(tuple("ab"), ((2, 3), (4,)))
    assert train(ours) == train(theirs, layout=same_layout)
    assert context(train(ours)) == context(train(theirs, layout=same_layout))
    assert evaluate(ours) == evaluate(theirs)
    assert context(evaluate(ours)) == context(evaluate(theirs))


def test_what_only_a_simulation_needs_is_no_part_of_the_terms() -> None:
    simulated = job().model_dump() | {"simulation": {"train": "x", "sites": 7}}
    assert train(Job.model_validate(simulated)) == train()


# Any other input gives another context

OTHERS: dict[str, Callable[[], Parameters]] = {
    "train": train,
    "session": lambda: train(session="f" + SESSION[1:]),
    "cohort": lambda: train(cohort=(0, 2, 3, 5, 7)),
    "fewer sites": lambda: train(cohort=COHORT[:-1]),
    "more sites": lambda: train(cohort=(*COHORT, 7)),
    "names": lambda: train(layout=Layout(("a", "c"), LAYOUT.shapes)),
    "order": lambda: train(layout=Layout(("b", "a"), ((4,), (2, 3)))),
    "shapes of one size": lambda: train(layout=Layout(LAYOUT.names, ((3, 2), (4,)))),
    "another size": lambda: train(layout=Layout(LAYOUT.names, ((2, 3), (5,)))),
    "clip": lambda: train(job(clip=0.1000001)),
    "sites": lambda: train(job(max_sites=11)),
    "weight": lambda: train(job(max_weight=16385)),
    "uniform": lambda: train(job(weights="uniform")),
    "ring": lambda: train(job(ring_bits=32)),
    "bits": lambda: train(job(value_bits=19)),
    "colluders": lambda: train(job(colluders=0.4)),
    "dropouts": lambda: train(job(dropouts=0.0)),
    "evaluate": evaluate,
    "evaluate: session": lambda: evaluate(session="f" + SESSION[1:]),
    "evaluate: cohort": lambda: evaluate(cohort=(0, 2, 3, 5, 7)),
    "evaluate: fewer sites": lambda: evaluate(cohort=COHORT[:-1]),
    "evaluate: labels": lambda: evaluate(job(labels=("yes", "nay"))),
    "evaluate: order of labels": lambda: evaluate(job(labels=("no", "yes"))),
    "evaluate: one more label": lambda: evaluate(job(labels=("yes", "no", "perhaps"))),
    "evaluate: labels of the same letters": lambda: evaluate(job(labels=("ye", "sno"))),
    "evaluate: sites": lambda: evaluate(job(max_sites=11)),
    "evaluate: colluders": lambda: evaluate(job(colluders=0.4)),
    "evaluate: dropouts": lambda: evaluate(job(dropouts=0.0)),
}


def test_whatever_differs_makes_another_context() -> None:
    seen: dict[bytes, str] = {}
    for name, make in OTHERS.items():
        digest = context(make())
        assert digest not in seen, f"{name} is the same as {seen[digest]}"
        seen[digest] = name


def test_another_roster_or_policy_makes_another_context() -> None:
    fewer, swapped = Roster(ROSTER.keys[:-1]), Roster(ROSTER.keys[::-1])
    contexts = {context(train()), context(train(), fewer), context(train(), swapped)}
    for policy in (
        replace(POLICY, colluders=2),
        replace(POLICY, min_cohort=4),
        replace(POLICY, min_ring_bits=16),
        replace(POLICY, max_clip=0.5),
    ):
        contexts.add(context(train(), policy=policy))
    assert len(contexts) == 7


def test_counts_are_exact_whatever_updates_are_rounded_to() -> None:
    coarse = job(clip=0.9, value_bits=2, max_weight=7, weights="uniform")
    assert evaluate(coarse) == evaluate()


# A cohort that cannot be


@pytest.mark.parametrize("terms", [train, evaluate])
@pytest.mark.parametrize(
    "cohort",
    [(), (0,), (0, 1), tuple(range(11)), (0, 0, 1), (2, 1, 0), (-1, 0, 1), (0, 1, 65535)],
)
def test_a_cohort_that_cannot_be_is_refused(
    terms: Callable[..., Parameters], cohort: tuple[int, ...]
) -> None:
    with pytest.raises(ParameterError):
        terms(cohort=cohort)
    assert terms(cohort=tuple(range(10)))


@pytest.mark.parametrize("terms", [train, evaluate])
@pytest.mark.parametrize("session", ["", "00" * 15, "00" * 17])
def test_a_session_is_sixteen_bytes(terms: Callable[..., Parameters], session: str) -> None:
    with pytest.raises(ParameterError):
        terms(session=session)


# Counts


def counted(counts: list[int], max_sites: int) -> list[int]:
    """What a site's counts are as ring elements, as sites encode them."""
    coding = evaluate(job(max_sites=max_sites), cohort=(0, 1, 2)).coding
    vector = np.array(counts, np.float64)
    words = encode_update(vector, 1, (0.0,), coding, None)
    elements: list[int] = words[LANES:].view(np.int32).tolist()
    return elements


@pytest.mark.parametrize("max_sites", [3, 128, 2048])
@given(st.data())
@settings(deadline=None)
def test_a_count_is_summed_as_it_is_up_to_the_limit(max_sites: int, data: st.DataObject) -> None:
    limit = evaluate(job(max_sites=max_sites), cohort=(0, 1, 2)).coding.levels
    numbers = st.integers(0, limit) | st.sampled_from([0, 1, limit - 1, limit])
    counts = data.draw(st.lists(numbers, max_size=30))
    assert counted(counts, max_sites) == counts


@pytest.mark.parametrize(
    ("max_sites", "count"), [(3, 2**29), (128, 2**24), (2048, 2**20), (65535, 32_768)]
)
@pytest.mark.parametrize("where", [0, 5])
def test_a_larger_count_is_refused_and_never_clipped(
    max_sites: int, count: int, where: int
) -> None:
    counts = [0, 1, 2, 3, 4, 5]
    counts[where] = count - 1
    assert counted(counts, max_sites) == counts
    counts[where] = count
    with pytest.raises(InputRefused, match="a count is larger"):
        counted(counts, max_sites)


def test_every_cell_of_a_large_confusion_matrix_is_exact() -> None:
    coding = evaluate(job(max_sites=3), cohort=(0, 1, 2)).coding
    counts = np.arange(coding.levels, coding.levels - 300**2, -1, dtype=np.float64)
    words = encode_update(counts, 1, (0.0,), coding, None)
    assert np.array_equal(words[LANES:].view(np.int32), counts)


@given(st.integers(3, 65535))
@settings(deadline=None)
def test_as_many_sites_as_allowed_can_all_count_up_to_the_limit(max_sites: int) -> None:
    limit = evaluate(job(max_sites=max_sites), cohort=(0, 1, 2)).coding.levels
    assert limit * max_sites < 2**31
    assert (2 * limit + 1) * max_sites >= 2**31  # and no larger limit would do


@pytest.mark.parametrize(("max_sites", "fewest"), [(128, 10**7), (2048, 10**6), (65535, 30_000)])
def test_the_limit_is_beyond_what_a_site_holds(max_sites: int, fewest: int) -> None:
    assert evaluate(job(max_sites=max_sites)).coding.levels >= fewest


# The floor


def test_the_floor_holds_as_it_is_for_training() -> None:
    assert floor_for(POLICY, train(), "train") == POLICY


def test_counts_are_not_held_against_the_ceiling_of_updates() -> None:
    """Everything else of the floor holds for them as well."""
    terms = evaluate()
    assert terms.coding.clip > POLICY.max_clip
    floor = floor_for(POLICY, terms, "evaluate")
    assert floor == replace(POLICY, max_clip=terms.coding.clip)


# What all sites must be asked alike

ADAPTER = np.arange(4, dtype=np.float32)
TRAIN = TrainRequest(SESSION, 3, 0, "{}", ("a", "b"), ADAPTER)
EVALUATE = EvaluateRequest(SESSION, 3, "{}", ("a", "b"), "validation", ADAPTER)
CHANGES: list[dict[str, Any]] = [
    {},
    {"round": 4},
    {"job": "{ }"},
    {"names": ("b", "a")},
    {"names": ("a",)},
    {"names": ("ab",)},
    {"names": ("a", "b", "")},
    {"adapter": np.array([0, 1, 2, 4], np.float32)},
    {"adapter": np.array([-0.0, 1, 2, 3], np.float32)},
    {"adapter": np.array([1, 0, 2, 3], np.float32)},
    {"adapter": ADAPTER[:3]},
    {"adapter": np.append(ADAPTER, np.float32(0))},
]


def hashed(request: TrainRequest | EvaluateRequest, **changes: Any) -> bytes:
    return hash_work(describe(replace(request, **changes)))


def test_the_hash_of_the_work_differs_whatever_is_changed() -> None:
    trained = [hashed(TRAIN, **change) for change in [*CHANGES, {"attempt": 1}]]
    evaluated = [hashed(EVALUATE, **change) for change in CHANGES]
    evaluated += [hashed(EVALUATE, split=split) for split in ("test", "train", "")]
    hashes = trained + evaluated
    assert len(set(hashes)) == len(hashes)
    assert {len(one) for one in hashes} == {32}


def test_every_field_of_a_description_is_hashed() -> None:
    work = describe(TRAIN)
    others: dict[str, Any] = {
        "stage": "evaluate",
        "round": 4,
        "attempt": 1,
        "split": "test",
        "job": "",
        "names": (),
        "adapter": bytes(32),
    }
    assert set(others) == {field.name for field in fields(Work)}
    changed = {hash_work(replace(work, **{name: value})) for name, value in others.items()}
    assert len(changed | {hash_work(work)}) == len(others) + 1


def test_the_same_work_has_the_same_hash_in_every_session() -> None:
    """A second session cannot have it summed again over other sites."""
    strided = np.repeat(ADAPTER, 2)[::2]
    for request in (TRAIN, EVALUATE):
        assert hashed(request) == hashed(request, session="f" + SESSION[1:])
        assert hashed(request) == hashed(request, adapter=ADAPTER.copy())
        assert hashed(request) == hashed(request, adapter=strided)


def test_a_description_says_what_is_done() -> None:
    trained, evaluated = describe(replace(TRAIN, attempt=2)), describe(EVALUATE)
    assert (trained.stage, trained.split, trained.attempt) == ("train", "train", 2)
    assert (evaluated.stage, evaluated.split, evaluated.attempt) == ("evaluate", "validation", 0)
    for work in (trained, evaluated):
        assert (work.round, work.job, work.names) == (3, "{}", ("a", "b"))
        assert len(work.adapter) == 32


@settings(deadline=None, max_examples=tries(50))
@given(
    losses=st.lists(st.floats(0, 2.0**24), min_size=1, max_size=3),
    sites=st.sampled_from([3, 128, 65535]),
)
def test_a_sum_of_losses_comes_back_to_a_part_of_a_level(losses: list[float], sites: int) -> None:
    """One metric alone would be off by a level a site: by nats, where texts are few."""
    coding = Coding(sites, 1.0, 32, 2, max_weight=1, metric_limit=2.0**24)
    lanes = np.zeros(LANES, np.uint32)
    for loss in losses:
        vector = encode_update(np.zeros(0), 1, split_loss(loss, coding), coding, None)
        lanes = lanes + vector[:LANES]
    found = join_losses(read_lanes(lanes, coding).metrics, coding)
    level = coding.metric_limit / coding.metric_levels
    least = len(losses) * (level / coding.metric_levels + 1e-9 * (1 + max(losses)))
    assert abs(found - sum(losses)) <= least


def test_a_site_of_an_earlier_version_sends_one_part() -> None:
    coding = Coding(3, 1.0, 32, 2, max_weight=1, metric_limit=2.0**24)
    lanes = encode_update(np.zeros(0), 1, (1234.0,), coding, None)[:LANES]
    level = coding.metric_limit / coding.metric_levels
    assert join_losses(read_lanes(lanes, coding).metrics, coding) == pytest.approx(1234, abs=level)
