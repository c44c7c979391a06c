"""Rank candidate backbones before any training: score each on a simulation's sites, one at a time.

Every site computes features of its own examples with the frozen candidate, and from them sums
(``client.selection.transferability``). The scores are computed from the sums over all sites. A
candidate that does not fit the job does not stop the others.
"""

import gc
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import datasets

from fedgraft.client.data.rows import encode
from fedgraft.client.model.batched_model import Stack, open_stack
from fedgraft.client.participant import open_participant
from fedgraft.client.selection.features import blocks_of, features_of
from fedgraft.client.selection.transferability import (
    Answers,
    Matrix,
    Prototypes,
    SiteSums,
    site_answers,
    site_sums,
    unit,
)
from fedgraft.client.selection.zero_shot import (
    DUAL_MODALITY,
    DualEncoder,
    is_dual,
    open_dual_encoder,
)
from fedgraft.common.adapters.model import cache_folder, choose_device, open_processor
from fedgraft.common.adapters.resident import close_backbone
from fedgraft.common.backbones.load import find_backbone, own_labels, read_config
from fedgraft.common.config.compatibility import refusal_of
from fedgraft.common.config.job import Job
from fedgraft.common.console import Console
from fedgraft.common.errors import InputError, JobError
from fedgraft.common.metrics.intervals import wilson_interval
from fedgraft.common.metrics.transferability import conditional, h_score, logme, nce
from fedgraft.common.seeds import numpy_generator
from fedgraft.simulations.baselines.compare import head_only_job
from fedgraft.simulations.data.partition import PreparedSites, prepare_sites
from fedgraft.simulations.grid.engine import Nodes, make_nodes
from fedgraft.simulations.grid.memory import Pace, PeakMemory
from fedgraft.simulations.grid.workers import Workers

__all__ = ["Failed", "Scored", "Selection", "select"]

S = TypeVar("S", SiteSums, Answers)
GROUP = 8  # sites whose sums are added in the same task


@dataclass(frozen=True)
class Scored:
    """The results of one candidate; scores in nats (``h_score`` has no unit), higher is better.

    ``leep`` and ``nce`` are None for a backbone without its own head. ``accuracy[k]`` is the share
    of the pooled test examples that are right with ``k`` shots, and ``interval[k]`` its 95 %
    interval. Both are None if 0 shots have no meaning for the candidate.
    """

    backbone: str
    logme: float
    h_score: float
    leep: float | None
    nce: float | None
    features: int
    parameters: int
    examples: int
    tested: int
    accuracy: dict[int, float | None]
    interval: dict[int, tuple[float, float] | None]
    seconds: float


@dataclass(frozen=True)
class Failed:
    """A candidate that does not fit the job, and the error."""

    backbone: str
    error: str
    hint: str


@dataclass(frozen=True)
class Selection:
    """The ``scored`` candidates, the best LogME first, and those that ``failed``."""

    sites: int
    scored: tuple[Scored, ...]
    failed: tuple[Failed, ...]
    peak_memory_mb: float

    def to_json(self) -> dict[str, Any]:
        """Return the selection as one JSON object."""
        return {
            "sites": self.sites,
            "backbones": [vars(one) for one in self.scored],
            "failed": [vars(one) for one in self.failed],
            "peak_memory_mb": round(self.peak_memory_mb, 1),
        }


def select(
    job: Job,
    candidates: dict[str, Callable[[], Job]],
    *,
    shots: Sequence[int] = (),
    console: Console,
) -> Selection:
    """Score ``candidates`` and return the ranking.

    ``candidates`` has, by name, a function that returns ``job`` with that backbone.

    Raises:
        InputError: the job has no labels, or its sites cannot be made.
    """
    if refused := refusal_of(job, "selection"):
        raise JobError(refused[0], hint=refused[1])
    prepared = prepare_sites(job, cache_folder() / "sites")
    if any(shots) and not any(site.test_examples for site in prepared.sites):
        raise JobError("no site has test examples", hint="simulation.test = ..., or no --shots")
    scored: list[Scored] = []
    failed: list[Failed] = []
    with PeakMemory() as memory, console.steps("backbone", len(candidates)) as steps:
        pace = Pace(memory, len(candidates))
        for name, make in candidates.items():
            began = time.monotonic()

            def within(done: int, total: int, pace: Pace = pace, name: str = name) -> None:
                steps.within(done / total, f"{name}  {pace.within(done)}")

            try:
                scored.append(_score(name, make(), prepared, shots, within))
                told = f"LogME {scored[-1].logme:.4f}"
            except InputError as error:
                failed.append(Failed(name, str(error), error.hint))
                told = "does not fit"
            _let_go()
            left = pace.after(len(prepared.sites), time.monotonic() - began)
            steps.done(f"{name}  {told}  {left}")
    scored.sort(key=lambda one: -one.logme)
    return Selection(len(prepared.sites), tuple(scored), tuple(failed), memory.megabytes)


def _let_go() -> None:
    """Free the memory of the last backbone, so that only one is loaded at a time."""
    close_backbone()
    gc.unfreeze()  # objects were frozen so that workers share them
    gc.collect()


@dataclass(frozen=True)
class _Place:
    """The arguments of a task: ``job`` with the candidate, ``source`` with the head's labels."""

    job: Job
    source: Job
    device: str
    nodes: Nodes
    shots: tuple[int, ...]

    @property
    def dual(self) -> DualEncoder | None:
        """The candidate's image and text encoders, if zero-shot is requested for images."""
        backbone = open_processor(self.job)[0]
        seen = self.job.task.modality.name == DUAL_MODALITY
        if 0 not in self.shots or not seen or not is_dual(read_config(backbone)):
            return None
        labels, prompt = self.job.job.labels, self.job.evaluation.prompt
        return open_dual_encoder(backbone.folder, labels, prompt)

    @property
    def stack(self) -> Stack:
        """The stack of the frozen candidate, with its own head if it has one."""
        return open_stack(self.source, device=self.device)


def _score(
    name: str,
    job: Job,
    prepared: PreparedSites,
    shots: Sequence[int],
    within: Callable[[int, int], None],
) -> Scored:
    began = time.monotonic()
    job = head_only_job(job)
    device = str(choose_device(prepared.settings.device))
    nodes = make_nodes(job, prepared, states="", device=device)
    place = _Place(job, _source_job(job), device, nodes, tuple(shots))
    with Workers(prepared.settings.workers, device=device) as workers:
        stack = place.stack  # opened here, so that forked workers share it
        has_head = not stack.bench.fresh_head
        total = len(nodes) * (2 if shots or has_head else 1)
        sums = _summed(workers, _first_pass, (place,), lambda done: within(done, total))
        answers = Answers(0.0, 0, {})
        if shots or has_head:
            second = (place, conditional(sums.soft), _prototypes(place, sums))
            before = len(nodes)
            answers = _summed(workers, _second_pass, second, lambda n: within(before + n, total))
    examples = int(sums.moments.examples)
    shares = {k: answers.right.get(k) for k in shots}
    return Scored(
        backbone=name,
        logme=logme(sums.moments),
        h_score=h_score(sums.moments),
        leep=answers.leep / examples if has_head else None,
        nce=nce(sums.hard) if has_head else None,
        features=sums.moments.sums.shape[1],
        parameters=stack.bench.backbone_parameters,
        examples=examples,
        tested=answers.tested,
        accuracy={k: None if n is None else n / answers.tested for k, n in shares.items()},
        interval={
            k: None if n is None else wilson_interval(n, answers.tested) for k, n in shares.items()
        },
        seconds=round(time.monotonic() - began, 3),
    )


def _source_job(job: Job) -> Job:
    """Return ``job`` with the labels of the backbone's own head, if the backbone's folder says."""
    found = find_backbone(job.backbone.source, weights=job.backbone.weights)
    names = tuple(str(name) for name in own_labels(found))
    if job.backbone.weights == "random" or len(names) < 2 or len(set(names)) < len(names):
        return job
    return job.model_copy(update={"job": job.job.model_copy(update={"labels": names})})


def _summed(
    workers: Workers,
    task: Callable[..., S | None],
    arguments: tuple[_Place, Any, Any] | tuple[_Place],
    told: Callable[[int], None],
) -> S:
    """Return the sum of ``task`` over all sites.

    The groups of sites do not depend on the number of workers. Each group's sum is added to the
    total in order, as soon as it is there, so that few sums exist at a time.
    """
    nodes = arguments[0].nodes
    groups = [range(at, min(at + GROUP, len(nodes))) for at in range(0, len(nodes), GROUP)]
    waiting = deque(workers.submit(_group, task, arguments, group) for group in groups)
    total: S | None = None
    for group in groups:
        found: S | None = waiting.popleft().result()
        if found is not None:
            total = found if total is None else total + found
        told(group.stop)
    if total is None:
        raise JobError("no site has training examples", hint="look at [simulation]")
    return total


def _group(
    task: Callable[..., S | None], arguments: tuple[Any, ...], sites: Sequence[int]
) -> S | None:
    total: S | None = None
    for site in sites:
        found = task(site, *arguments)
        if found is not None:
            total = found if total is None else total + found
    return total


def _first_pass(site: int, place: _Place) -> SiteSums | None:
    participant = open_participant(place.nodes[site])
    train = participant.splits(place.job).train
    return site_sums(
        blocks_of(place.stack, train, participant.store),
        train.labels,
        place.job.measures.classes,
        shots=place.shots,
        generator=numpy_generator(place.job.job.seed, "shots", participant.config.name),
    )


def _second_pass(site: int, place: _Place, given: Matrix, prototypes: Prototypes) -> Answers:
    participant, stack = open_participant(place.nodes[site]), place.stack
    splits = participant.splits(place.job)
    has_head = not stack.bench.fresh_head
    train = blocks_of(stack, splits.train, participant.store) if has_head else iter(())
    test = blocks_of(stack, splits.test, participant.store) if place.shots else iter(())
    knows = 0 in place.shots and _knows_labels(place)
    found = site_answers(train, test, given, prototypes, knows_labels=knows)
    if place.dual and not knows:
        right = place.dual.answers(splits.test) == splits.test.labels
        found.right[0] = int(right.sum())
    return found


def _knows_labels(place: _Place) -> bool:
    """Return whether the candidate's own head predicts the job's labels."""
    return not place.stack.bench.fresh_head and place.source.job.labels == place.job.job.labels


def _prototypes(place: _Place, sums: SiteSums) -> dict[int, Matrix]:
    """Return the prototypes of each number of shots; for texts, 0 shots use the labels' names."""
    found = dict(sums.shots)
    if 0 in place.shots and place.job.task.modality.named and not _knows_labels(place):
        found[0] = _named(place)
    return found


def _named(place: _Place) -> Matrix:
    """Return unit features of the labels' names, float64 [c, d].

    ``card_arrival`` is read as "card arrival".
    """
    names = [name.replace("_", " ").replace("-", " ") for name in place.job.job.labels]
    columns = {place.job.task.content: names, "label": list(range(len(names)))}
    rows = datasets.Dataset.from_dict(columns)
    backbone, processor = open_processor(place.job)
    examples = encode(rows, processor, place.job, store=None, key=backbone.fingerprint)
    return unit(features_of(place.stack, examples).values)
