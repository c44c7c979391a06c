"""Compare the federation's adapter with the models that the site has without the federation.

    federated    the adapter that was kept (``results``)
    local_only   trained here alone, for as many epochs as a site trains in the federation, from the
                 earlier adapter if the job continues one
    zero_shot    the backbone with its own head, untouched (only if it has one for this job)

The comparison shows whether the federation was worth it for this site. It is the measurement that a
simulation makes for every site, on the same examples: the site's own test file, or else its
validation examples, which the run did not train on. It runs here, after the run, and nothing of it
leaves.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from fedgraft.client.participant import Participant
from fedgraft.client.results.judge import figures, judge
from fedgraft.client.results.store import Result
from fedgraft.client.training.evaluate import measure
from fedgraft.client.training.trainer import Trained, TrainingTask, train
from fedgraft.common.adapters.model import Workbench, open_workbench
from fedgraft.common.adapters.peft_folder import read_adapter
from fedgraft.common.config.job import Job
from fedgraft.common.errors import BackboneError
from fedgraft.common.examples import Examples, count_documents, has_labels
from fedgraft.common.layout import Vector
from fedgraft.common.metrics.evaluation import Evaluation
from fedgraft.common.seeds import torch_generator

__all__ = ["compare", "epochs_of"]

LOCAL = "local-only"  # its shuffling is derived from this name, as in a simulation


def epochs_of(job: Job, rounds: int, sites: int) -> int:
    """Return the epochs that one of ``sites`` sites trains on average in ``rounds`` rounds."""
    share = job.rounds.cohort_size(sites) / max(sites, 1)
    return max(1, round(rounds * share)) * job.training.epochs


def compare(at: Participant, result: Result) -> dict[str, Any]:
    """Measure all models here; return the report, as JSON.

    Raises:
        BackboneError: the backbone is not the one that the adapter belongs to.
        InputError: the adapter cannot be read.
        DataError: the site's files do not match the job.
    """
    job, bench = result.job, open_workbench(result.job)
    if bench.backbone.fingerprint != result.fingerprint:
        raise BackboneError(
            "the backbone has changed since the run", hint="bring back the one it was made with"
        )
    splits = at.splits(job)
    split = "test" if len(splits.test) else "validation"
    tested = splits.test if len(splits.test) else splits.validation
    own = dict(_models(at, result, bench, splits.train, tested)) if len(tested) else {}
    name, seed, share = at.config.name, job.job.seed, job.task.share.key
    metrics = {
        model: one and figures(one, job.measures, seed, name, model) for model, one in own.items()
    }
    judged = judge(own, seed, name=name)
    alone = judged.get("local_only")
    return {
        "site": at.config.name,
        "run": result.run,
        "session": result.session,
        "job": job.job.name,
        "task": job.job.task,
        "received": result.received,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": version("fedgraft"),
        "backbone": result.backbone,
        "fingerprint": result.fingerprint,
        "adapter": result.adapter,
        "sites": result.sites,
        "masked": job.privacy.secure_aggregation.enabled,
        "rounds": [
            {"round": one.round, "sites": one.sites, share: one.accuracy, "loss": one.loss}
            for one in result.rounds
        ],
        "examples": count_documents(splits.train),
        "tested_on": split,
        "test_examples": count_documents(tested),
        "models": {"federated": None, "local_only": None, "zero_shot": None, **metrics},
        "comparisons": judged,
        "verdict": alone["sentence"]
        if alone
        else f"Whether federating helped {name} is not known.",
        "outcome": alone["outcome"] if alone else "unknown",
    }


def _models(
    at: Participant, result: Result, bench: Workbench, train_on: Examples, tested: Examples
) -> Iterator[tuple[str, Evaluation | None]]:
    """Yield each model's name and evaluation; None for a model that could not be trained."""
    job, stack = result.job, at.stack(result.job)

    def test(vector: Vector) -> Evaluation:
        measures = job.measures
        return measure(stack, bench.layout, vector, tested, measures=measures, store=at.store)

    yield "federated", test(read_adapter(bench, result.folder / "adapter"))
    if not bench.fresh_head:
        yield "zero_shot", test(bench.initial)
    start = bench.initial
    if job.start is not None and (first := at.first_adapter(result.session)) is not None:
        start = bench.layout.merged(start, (bench.layout.only(result.names), first))
    elif job.start is not None:
        return  # training from the backbone alone would be no fair comparison
    if not has_labels(train_on):
        return
    generator = torch_generator(job.job.seed, LOCAL, at.config.name)
    task = TrainingTask(train_on, start, generator, at.store)
    epochs = epochs_of(job, len(result.rounds), result.sites)
    (alone,) = train(stack, bench.layout, [task], settings=job.training.alone, epochs=epochs)
    yield "local_only", test(alone.vector) if isinstance(alone, Trained) else None
