"""The models that the federated model is compared with, measured with the sites' code and data.

    zero_shot        the unchanged backbone with its own head (only if that head knows the labels)
    head_only        the same federation, but only the head is trained
    local_only       each site alone, for as many epochs as a site trains in the federation
    central          one model on all sites' data pooled, as many epochs: if data could be shared
    federated        the federation's adapter
    federated_tuned  the federation's adapter after a short fine-tuning at each site

If the job starts from an earlier adapter, ``local_only`` and ``central`` start from it, too. Every
model is tested on each site's own test set; the pooled test set is all these test sets together.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from fedgraft.client.data.splits import Splits
from fedgraft.client.model.batched_model import Stack
from fedgraft.client.participant import Participant, open_participant
from fedgraft.client.results.compare import epochs_of
from fedgraft.client.training.evaluate import measure
from fedgraft.client.training.trainer import Trained, TrainingTask, train
from fedgraft.common.adapters.initial import starting_point
from fedgraft.common.adapters.model import Workbench, open_workbench
from fedgraft.common.config.job import Job
from fedgraft.common.config.training import Training
from fedgraft.common.examples import Examples, concatenate, has_labels
from fedgraft.common.layout import Layout, Vector
from fedgraft.common.messages.payloads import EvaluateRequest
from fedgraft.common.methods import HeadMethod
from fedgraft.common.metrics.evaluation import Evaluation
from fedgraft.common.seeds import numpy_generator, torch_generator
from fedgraft.simulations.baselines.site_map import keep_direction, why_absent
from fedgraft.simulations.grid.local_grid import NodeConfig
from fedgraft.simulations.grid.workers import Workers, cores

__all__ = ["Measured", "Started", "Trial", "head_only_job", "start"]

MOST_OTHERS = 50
TESTED = 64  # sites tested in one task: a task carries the adapter and the names of all sites
TUNED_RATE = 0.3  # times the federation's learning rate: the adapter is close to its optimum


@dataclass(frozen=True)
class Measured:
    """Results of one model, or of one model per site: on each site's own test set, and pooled.

    ``own`` has None for a site whose model could not be trained. ``models`` is None for one model,
    whose pooled result is the sum of ``own``. If every site has its own model, ``models`` has the
    metrics of each model on the pooled test set (with many sites, on a sample of it).
    """

    own: tuple[Evaluation | None, ...]
    models: tuple[dict[str, float], ...] | None = None

    def pooled(self) -> Evaluation | None:
        """Return the results in ``own`` joined in order; None if no site has a result."""
        known = [evaluation for evaluation in self.own if evaluation is not None]
        return _pool(known) if known else None


@dataclass(frozen=True)
class Trial:
    """A finished federation for comparisons: the final adapter, and the round it comes from.

    ``together`` sites are trained in one pass.
    """

    job: Job
    nodes: Sequence[NodeConfig]
    session: str
    names: tuple[str, ...]
    adapter: Vector
    round: int
    together: int


@dataclass(frozen=True)
class Started:
    """A comparison that runs on the workers."""

    tasks: "list[Future[list[Any]]]"
    finish: Callable[[list[Any]], Measured]

    def result(self) -> Measured:
        """Wait for the comparison and return its result."""
        return self.finish([result for task in self.tasks for result in task.result()])


def head_only_job(job: Job) -> Job:
    """Return the job of the same federation with the backbone as feature extractor."""
    aggregation = job.aggregation.model_copy(update={"rule": "fedavg"})
    changes = {"method": HeadMethod(kind="head"), "aggregation": aggregation}
    return job.model_copy(update={**changes, "training": job.training.alone, "start": None})


def start(name: str, trial: Trial, workers: Workers) -> Started | None:
    """Start the comparison ``name``; return None if it has no meaning for this job."""
    sites = range(len(trial.nodes))
    if name == "central":
        return Started([workers.submit(_central, trial)], _one_model)
    if name == "zero_shot" and open_workbench(trial.job).fresh_head:
        return None
    task = COMPARED[name]
    finish = _separate_models if name == "local_only" else _one_model
    # A site that is only tested is tested alone, so the size of its group changes no result.
    trains = name in ("local_only", "federated_tuned")
    size = trial.together if trains else max(1, min(TESTED, len(sites) // (4 * cores())))
    groups = [sites[at : at + size] for at in range(0, len(sites), size)]
    return Started([workers.submit(task, trial, group) for group in groups], finish)


def _one_model(own: list[Evaluation | None]) -> Measured:
    return Measured(tuple(own))


def _separate_models(results: list[tuple[Evaluation, dict[str, float]] | None]) -> Measured:
    own = tuple(None if result is None else result[0] for result in results)
    # A model without a test example would count as a model that is never right.
    return Measured(own, tuple(result[1] for result in results if result is not None and result[1]))


def _pool(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Return all evaluations joined to one; only one pooled tally is ever made."""
    return evaluations[0].joined(evaluations[1:])


@dataclass(frozen=True)
class _Place:
    """One site, as a task of a comparison uses it."""

    job: Job
    participant: Participant
    bench: Workbench
    stack: Stack
    splits: Splits

    @property
    def layout(self) -> Layout:
        """The layout of all parameters that are trained at a site."""
        return self.bench.layout

    def test(self, adapter: Vector, examples: Examples) -> Evaluation:
        """Evaluate ``adapter``, float32 [layout.size], on ``examples``."""
        store, measures = self.participant.store, self.job.measures
        return measure(self.stack, self.layout, adapter, examples, measures=measures, store=store)

    def task(self, start: Vector, purpose: str) -> TrainingTask:
        """Return the task of training on the site's own data."""
        generator = torch_generator(self.job.job.seed, purpose, self.participant.config.name)
        return TrainingTask(self.splits.train, start, generator, self.participant.store)

    def federated(self, trial: Trial) -> Vector:
        """Return the trial's adapter with the tensors that stay at the site, such as a head."""
        names, number = trial.names, trial.round
        request = EvaluateRequest(trial.session, number, "", names, "test", trial.adapter)
        trained = self.layout.only((*names, *self.bench.local.names))
        known = self.participant.start(self.bench, trained, request)
        return self.layout.merged(self.bench.initial, (trained, known))


def _place(trial: Trial, site: int) -> _Place:
    participant = open_participant(trial.nodes[site])
    bench, stack = open_workbench(trial.job), participant.stack(trial.job)
    return _Place(trial.job, participant, bench, stack, participant.splits(trial.job))


def _begin(trial: Trial) -> Vector:
    """Return a model's start, float32 [layout.size]: the earlier adapter, if there is one."""
    bench = open_workbench(trial.job)
    if trial.job.start is None:
        return bench.initial
    exchanged = bench.layout.only(trial.names)
    return bench.layout.merged(
        bench.initial, (exchanged, starting_point(trial.job, bench, exchanged))
    )


def _train(
    places: Sequence[_Place], tasks: Sequence[TrainingTask], settings: Training, epochs: int
) -> list[Vector | None]:
    """Train at each place and return the adapters.

    An adapter is None if its loss was not finite, or if the site has no labels: neither must end a
    comparison. Settings that have a meaning only in a federation, such as domain adaptation, are
    not used.
    """
    stack, layout = places[0].stack, places[0].layout
    known = [n for n, task in enumerate(tasks) if has_labels(task.examples)]
    few, settings = [tasks[n] for n in known], settings.alone
    results = train(stack, layout, few, settings=settings, epochs=epochs)
    came = dict(zip(known, results, strict=True))
    each = (came.get(number) for number in range(len(tasks)))
    return [one.vector if isinstance(one, Trained) else None for one in each]


def _budget(trial: Trial) -> int:
    """Return the mean number of epochs per site; a round may have asked only some sites."""
    return epochs_of(trial.job, trial.round, len(trial.nodes))


def _sample(trial: Trial, site: int) -> list[int]:
    """Return the sites, other than ``site``, on whose test sets its own model is tested."""
    others = [other for other in range(len(trial.nodes)) if other != site]
    if len(others) <= MOST_OTHERS:
        return others
    draw = numpy_generator(trial.job.job.seed, "elsewhere", site)
    return sorted(draw.choice(others, MOST_OTHERS, replace=False).tolist())


def _federated(trial: Trial, sites: Sequence[int]) -> list[Evaluation]:
    places = (_place(trial, site) for site in sites)
    return [place.test(place.federated(trial), place.splits.test) for place in places]


def _tuned(trial: Trial, sites: Sequence[int]) -> list[Evaluation | None]:
    places = [_place(trial, site) for site in sites]
    settings = trial.job.training
    settings = settings.model_copy(update={"learning_rate": settings.learning_rate * TUNED_RATE})
    epochs = trial.job.simulation.finetune_epochs if trial.job.simulation else 1
    tasks = [place.task(place.federated(trial), "finetune") for place in places]
    return [
        None if adapter is None else place.test(adapter, place.splits.test)
        for place, adapter in zip(places, _train(places, tasks, settings, epochs), strict=True)
    ]


def _zero_shot(trial: Trial, sites: Sequence[int]) -> list[Evaluation]:
    places = (_place(trial, site) for site in sites)
    # Factors B start at zero, so this is the unchanged backbone.
    return [place.test(place.bench.initial, place.splits.test) for place in places]


def _local(trial: Trial, sites: Sequence[int]) -> list[tuple[Evaluation, dict[str, float]] | None]:
    places, begin = [_place(trial, site) for site in sites], _begin(trial)
    tasks = [place.task(begin, "local-only") for place in places]
    trained = _train(places, tasks, trial.job.training, _budget(trial))
    if not why_absent(trial.job, len(trial.nodes)):
        exchanged = places[0].layout.only(trial.names)
        for place, adapter in zip(places, trained, strict=True):
            if adapter is not None:
                moved = place.layout.part(adapter - begin, exchanged)
                keep_direction(place.participant.state, moved)
    return [
        None if adapter is None else _tried(trial, site, place, adapter)
        for site, place, adapter in zip(sites, places, trained, strict=True)
    ]


def _tried(
    trial: Trial, site: int, place: _Place, adapter: Vector
) -> tuple[Evaluation, dict[str, float]]:
    """Return the result on the site's own test set, and the metrics on its and others' pooled.

    The metrics are {} if no test set has an example.
    """
    own = place.test(adapter, place.splits.test)
    # For thousands of sites a sample is enough: all pairs would be a million evaluations.
    others = (_place(trial, other).splits.test for other in _sample(trial, site))
    pooled = _pool([own, *(place.test(adapter, test) for test in others)]).tally
    if not pooled.examples:
        return own, {}
    found = trial.job.measures.figures(pooled)
    # A mean over models has no meaning for metrics that some models lack, or for groups.
    return own, {key: value for key, value in found.items() if isinstance(value, float)}


def _central(trial: Trial) -> list[Evaluation | None]:
    places = [_place(trial, site) for site in range(len(trial.nodes))]
    place = places[0]
    settings = trial.job.training
    if trial.job.simulation:
        changes = trial.job.simulation.central.model_dump(exclude_none=True)
        settings = settings.model_copy(update=changes)
    parts = [other.splits.train for other in places]
    pool = concatenate([part for part in parts if has_labels(part)])
    task = replace(place.task(_begin(trial), "central"), examples=pool)
    (adapter,) = _train([place], [task], settings, _budget(trial))
    if adapter is None:
        return [None] * len(places)
    return [place.test(adapter, other.splits.test) for other in places]


COMPARED: dict[str, Callable[[Trial, Sequence[int]], list[Any]]] = {
    "federated": _federated,
    "federated_tuned": _tuned,
    "local_only": _local,
    "zero_shot": _zero_shot,
}
