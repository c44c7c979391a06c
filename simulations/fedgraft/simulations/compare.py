"""What federating is held against, measured with the sites' own code on the sites' own data.

    zero_shot        the backbone with its own head, untouched (only if that head knows the labels)
    head_only        the same federation, but only the head trains
    local_only       each site alone, for as many epochs as a site trains in the federation
    central          one model on all sites' data pooled, as many epochs: if data could be shared
    federated        the federation's adapter
    federated_tuned  the federation's adapter after a short fine-tune at each site

Every model is tested on each site's own test set; the pooled test set is all of them together.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from fedgraft.client.evaluation import Evaluation, evaluate
from fedgraft.client.examples import Examples, concatenate
from fedgraft.client.participant import Participant, Splits, open_participant
from fedgraft.client.training import train
from fedgraft.common.adapters import Vector
from fedgraft.common.errors import SiteFailure
from fedgraft.common.job import HeadMethod, Job, Training
from fedgraft.common.metrics import Tally
from fedgraft.common.payloads import EvaluateRequest
from fedgraft.common.seeds import numpy_generator, torch_generator
from fedgraft.common.workbench import Workbench, open_workbench
from fedgraft.simulations.grid import NodeConfig
from fedgraft.simulations.workers import Workers

__all__ = ["Measured", "Started", "Trial", "head_only_job", "start"]

MOST_OTHERS = 50
TUNED_RATE = 0.3  # of the federation's peak: the adapter is close to its optimum already


@dataclass(frozen=True)
class Measured:
    """One model, or one model a site: on each site's own test set, and on all of them pooled.

    ``own`` has None for a site whose model could not be trained. ``models`` is None for one model,
    whose pooled result is the sum of ``own``; where every site has its own, it has the
    ``Tally.summary`` of each model on the pooled test set (of many sites, on a sample of it).
    """

    own: tuple[Evaluation | None, ...]
    models: tuple[dict[str, float], ...] | None = None

    def pooled(self) -> Tally | None:
        """``own`` summed; None if no site has a result."""
        known = [evaluation for evaluation in self.own if evaluation is not None]
        return _pool(known) if known else None


@dataclass(frozen=True)
class Trial:
    """A finished federation to compare with: the final adapter and the round it comes from."""

    job: Job
    nodes: tuple[NodeConfig, ...]
    session: str
    names: tuple[str, ...]
    adapter: Vector
    round: int


@dataclass(frozen=True)
class Started:
    """A comparison under way on the workers."""

    tasks: "list[Future[Any]]"
    finish: Callable[[list[Any]], Measured]

    def result(self) -> Measured:
        """Wait for it."""
        return self.finish([task.result() for task in self.tasks])


def head_only_job(job: Job) -> Job:
    """The same federation with the backbone as feature extractor."""
    aggregation = job.aggregation.model_copy(update={"rule": "fedavg"})
    return job.model_copy(update={"method": HeadMethod(kind="head"), "aggregation": aggregation})


def start(name: str, trial: Trial, workers: Workers) -> Started | None:
    """Start the comparison ``name``; None if it means nothing for this job."""
    sites = range(len(trial.nodes))
    if name == "central":
        return Started([workers.submit(_central, trial)], lambda results: results[0])
    if name == "local_only":
        return Started([workers.submit(_local, trial, site) for site in sites], _separate_models)
    if name == "zero_shot" and open_workbench(trial.job).fresh_head:
        return None
    task = {"federated": _federated, "federated_tuned": _tuned, "zero_shot": _zero_shot}[name]
    return Started([workers.submit(task, trial, site) for site in sites], _one_model)


def _one_model(own: list[Evaluation | None]) -> Measured:
    return Measured(tuple(own))


def _separate_models(results: list[tuple[Evaluation, dict[str, float]] | None]) -> Measured:
    own = tuple(None if result is None else result[0] for result in results)
    # Without a test example a model would count as one that is never right.
    return Measured(own, tuple(result[1] for result in results if result is not None and result[1]))


def _pool(evaluations: Sequence[Evaluation]) -> Tally:
    """The sum of the tallies, of which never more than one exists."""
    loss = reduce(add, (one.loss for one in evaluations))  # sum() rounds differently from 3.12 on
    true = np.concatenate([one.true for one in evaluations])
    predicted = np.concatenate([one.predicted for one in evaluations])
    return Tally.of(loss, true, predicted, evaluations[0].classes)


@dataclass(frozen=True)
class _Place:
    """A task's own view of one site."""

    job: Job
    participant: Participant
    bench: Workbench
    splits: Splits

    def test(self, examples: Examples) -> Evaluation:
        classes, precision = len(self.job.job.labels), self.job.training.precision
        return evaluate(self.bench.model, examples, classes=classes, precision=precision)

    def train(self, examples: Examples, settings: Training, epochs: int, purpose: str) -> bool:
        """Whether it could be done: a loss that is not finite must not end the comparison."""
        generator = torch_generator(self.job.job.seed, purpose, self.participant.config.name)
        model, names = self.bench.model, self.bench.layout.names
        try:
            train(model, names, examples, settings=settings, generator=generator, epochs=epochs)
        except SiteFailure:
            return False
        return True


def _place(trial: Trial, site: int) -> _Place:
    participant = open_participant(trial.nodes[site])
    bench = open_workbench(trial.job, device=participant.device)
    return _Place(trial.job, participant, bench, participant.splits(trial.job))


def _budget(trial: Trial) -> int:
    """Epochs that a site took part in, on average: only some may have been asked in a round."""
    sites = len(trial.nodes)
    share = trial.job.rounds.cohort_size(sites) / sites
    return max(1, round(trial.round * share)) * trial.job.training.epochs


def _sample(trial: Trial, site: int) -> list[int]:
    """Sites other than ``site`` on whose test sets its own model is tried."""
    others = [other for other in range(len(trial.nodes)) if other != site]
    if len(others) <= MOST_OTHERS:
        return others
    draw = numpy_generator(trial.job.job.seed, "elsewhere", site)
    return sorted(draw.choice(others, MOST_OTHERS, replace=False).tolist())


def _federated(trial: Trial, site: int) -> Evaluation:
    place = _place(trial, site)
    _put_federated(trial, place)
    return place.test(place.splits.test)


def _tuned(trial: Trial, site: int) -> Evaluation | None:
    place = _place(trial, site)
    _put_federated(trial, place)
    settings = place.job.training
    settings = settings.model_copy(update={"learning_rate": settings.learning_rate * TUNED_RATE})
    epochs = place.job.simulation.finetune_epochs if place.job.simulation else 1
    if not place.train(place.splits.train, settings, epochs, "finetune"):
        return None
    return place.test(place.splits.test)


def _put_federated(trial: Trial, place: _Place) -> None:
    """The trial's adapter, and the site's own head where heads are local."""
    request = EvaluateRequest(trial.session, trial.round, "", trial.names, "test", trial.adapter)
    place.participant.put(place.bench, place.bench.layout.only(trial.names), request)


def _zero_shot(trial: Trial, site: int) -> Evaluation:
    place = _place(trial, site)
    place.bench.put()  # factors B start at zero: this is the backbone itself
    return place.test(place.splits.test)


def _local(trial: Trial, site: int) -> tuple[Evaluation, dict[str, float]] | None:
    """Its own test set, and ``Tally.summary`` of that and others'; {} if they have no example."""
    place = _place(trial, site)
    place.bench.put()
    if not place.train(place.splits.train, place.job.training, _budget(trial), "local-only"):
        return None
    own = place.test(place.splits.test)
    # Of thousands of sites a sample will do: all of them would be a million evaluations.
    others = _sample(trial, site)
    elsewhere = [place.test(_place(trial, other).splits.test) for other in others]
    pooled = _pool([own, *elsewhere])
    return own, pooled.summary() if pooled.examples else {}


def _central(trial: Trial) -> Measured:
    places = [_place(trial, site) for site in range(len(trial.nodes))]
    place = places[0]
    place.bench.put()
    settings = place.job.training
    if place.job.simulation:
        changes = place.job.simulation.central.model_dump(exclude_none=True)
        settings = settings.model_copy(update=changes)
    pool = concatenate([other.splits.train for other in places])
    if not place.train(pool, settings, _budget(trial), "central"):
        return _one_model([None] * len(places))
    return _one_model([place.test(other.splits.test) for other in places])
