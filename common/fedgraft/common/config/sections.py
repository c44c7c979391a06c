"""Sections of a job without their own file: job, backbone, start, rounds and aggregation."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from fedgraft.common.aggregation import RuleName
from fedgraft.common.metrics.metric import Metric
from fedgraft.common.section import Duration, IllegalJob, Section
from fedgraft.common.tasks import TASKS, TaskName
from fedgraft.common.tasks.base import composed

__all__ = [
    "LOSS",
    "Aggregation",
    "Backbone",
    "EarlyStopping",
    "General",
    "Rounds",
    "ServerOptimizer",
    "Start",
]

LOSS = Metric("loss", "loss", percent=False, higher=False)
WATCHED: dict[str, Metric] = {
    metric.key: metric
    for metric in (LOSS, *(one for task in TASKS.values() for one in task.watched))
}
"""The metrics that early stopping can watch; each task has some of them."""

FEW_ROUNDS = 0.5  # beta1: an average over two rounds
USUAL_STEP = 0.01  # of a value of an adapter in a round, as sites train adapters
TOO_FAR = 5  # steps of the sites: a named rate that can go farther is pointed out
LARGEST_STEP = 3  # of a server optimiser, in steps of the sites; 1 would be slow to start

if TYPE_CHECKING:
    MetricName = str
else:
    MetricName = Literal[tuple(WATCHED)]


class General(Section):
    """``[job]``: the name, the task and its labels, and the seed of all random numbers."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    task: TaskName
    labels: tuple[str, ...] = Field(default=(), description="to choose from, or tags of words")
    heads: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="several tasks: the labels of each, every label in one"
    )
    seed: int = Field(default=0, ge=0, lt=2**62)

    @property
    def head_of(self) -> tuple[int, ...]:
        """Return the number of the head for each label; empty if one head has all labels."""
        numbers = {label: n for n, labels in enumerate(self.heads.values()) for label in labels}
        return tuple(numbers[label] for label in self.labels) if numbers else ()

    @model_validator(mode="after")
    def _labels_fit(self) -> Self:
        TASKS[self.task].check_labels(self.labels)
        return self

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        names = [composed(name) for name in self.labels]  # equal words may be spelt in two ways
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise IllegalJob(f"labels named twice: {', '.join(twice)}", "name each label once")
        return self

    @model_validator(mode="after")
    def _heads_divide_the_labels(self) -> Self:
        named = [label for labels in self.heads.values() for label in labels]
        if self.heads and sorted(named) != sorted(self.labels):
            amiss = sorted(set(self.labels) ^ set(named)) or sorted(named)
            raise IllegalJob(
                f"job.heads and job.labels differ: {', '.join(amiss[:5])}",
                "every label belongs to exactly one head, and a head has no others",
            )
        if small := [name for name, labels in self.heads.items() if len(labels) < 2]:
            raise IllegalJob(f"head {small[0]} has fewer than two labels", "what would it decide?")
        return self


class Backbone(Section):
    """``[backbone]``: the frozen model; ``weights = "random"`` uses only its ``config.json``.

    ``quantize`` is the number of bits with which sites store the frozen linear layers during
    computation.
    """

    source: str = Field(pattern=r"^((hf|path|builtin):.+|manifest:[0-9a-f]{64})$")
    weights: Literal["pretrained", "random"] = "pretrained"
    quantize: Literal["none", "8bit", "4bit"] = "none"

    @property
    def bits(self) -> int:
        """Return the bits of a frozen linear layer's weight; 0 if the weights are not quantised."""
        return {"none": 0, "8bit": 8, "4bit": 4}[self.quantize]


class Start(Section):
    """``[start]``: continue from an earlier run's adapter, as ``fedgraft export`` writes it.

    If ``head`` is false, the head starts from new weights, for a job with other labels. Only the
    coordinator reads the folder: sites get the adapter in the first round.
    """

    adapter: str = Field(min_length=1)
    head: bool = True


class EarlyStopping(Section):
    """Stop if federated validation has not improved for ``patience`` evaluations.

    ``metric`` is the loss, or one of the metrics that the job's task lets be watched.
    """

    metric: MetricName = "loss"
    patience: int = Field(default=3, ge=1)
    min_delta: float = Field(default=0.0, ge=0)

    def score(self, figures: Mapping[str, Any]) -> float:
        """Return the watched metric of ``figures``, with the sign with which larger is better."""
        value = float(figures[self.metric])
        return value if WATCHED[self.metric].higher else -value


class Rounds(Section):
    """``[rounds]``: the number of rounds, the sites of a round, and the time limit for replies."""

    count: int = Field(default=10, ge=1)
    cohort: int | None = Field(default=None, ge=1, description="sites of a round; all if absent")
    fraction: float | None = Field(default=None, gt=0, le=1)
    min_sites: int = Field(default=1, ge=1)
    deadline: Duration = 1800.0
    evaluate_every: int = Field(default=1, ge=1)
    early_stopping: EarlyStopping | None = None

    @model_validator(mode="after")
    def _one_cohort(self) -> Self:
        if self.cohort is not None and self.fraction is not None:
            raise IllegalJob("both cohort and fraction are given", "keep one of them")
        if self.cohort is not None and self.min_sites > self.cohort:
            raise IllegalJob(
                f"min_sites = {self.min_sites} can never be reached with cohort = {self.cohort}",
                "raise rounds.cohort or lower rounds.min_sites",
            )
        return self

    def check_sites(self, sites: int) -> None:
        """Check that rounds can work with ``sites`` sites.

        Raises:
            IllegalJob: the cohort is larger, or ``min_sites`` can never be reached.
        """
        if self.cohort is not None and self.cohort > sites:
            raise IllegalJob(
                f"cohort = {self.cohort} is larger than the {sites} sites",
                f"rounds.cohort = {sites}, or leave it out to ask every site",
            )
        size = self.cohort_size(sites)
        if self.min_sites > size:
            raise IllegalJob(
                f"min_sites = {self.min_sites} can never be reached: a round asks {size} of "
                f"{sites} sites",
                "lower rounds.min_sites or ask more sites in a round",
            )

    def cohort_size(self, sites: int) -> int:
        """Return the number of sites in a round if ``sites`` are present (at least one)."""
        if self.fraction is not None:
            return max(1, round(self.fraction * sites))
        return min(sites, self.cohort) if self.cohort is not None else sites


class ServerOptimizer(Section):
    """The optimiser of the global adapter (Reddi et al. 2021, "Adaptive Federated Opt.").

    It computes the adapter's step from the aggregate. A job that names no ``learning_rate`` gets
    one with which the server moves at most a few times as far as the sites, whatever they send:

    - ``momentum``: 1 - beta1, because m adds up to 1 / (1 - beta1) steps of the sites;
    - ``adam``, ``yogi``: LARGEST_STEP x tau, because a step is at most learning_rate / tau times m;
    - ``reptile``: 2, because its factor 1 - t/T is one half in the mean.

    Such a job has by default also a ``beta1`` for the few rounds of fine-tuning (0.9 averages over
    ten rounds), and a ``tau`` as large as a usual step. With a named rate they are the paper's.
    """

    kind: Literal["none", "momentum", "adam", "yogi", "reptile"] = "none"
    learning_rate: float = Field(default=1.0, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)
    tau: float = Field(default=1e-3, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _rates_by_kind(cls, raw: Any) -> Any:
        """Fill in the rate (and tau) that a job does not name; wrong values are refused later."""
        if not isinstance(raw, Mapping) or "learning_rate" in raw:
            return raw
        filled = _UNNAMED_RATES.get(str(raw.get("kind")))
        try:
            beta1, tau = float(raw.get("beta1", FEW_ROUNDS)), float(raw.get("tau", USUAL_STEP))
        except (TypeError, ValueError):
            return raw
        if filled is None or not (0 <= beta1 < 1 and tau > 0):
            return raw
        return {**raw, **filled(beta1, tau)}

    @property
    def reach(self) -> float:
        """Return how many times as far as the sites' mean step the server may move in a round.

        It is a bound: the steps of adam and yogi are shorter where updates are large.
        """
        reaches = {"momentum": 1 / (1 - self.beta1), "adam": 1 / self.tau, "yogi": 1 / self.tau}
        return self.learning_rate * reaches.get(self.kind, 1.0)


def _bounded(beta1: float, tau: float) -> dict[str, float]:
    return {"learning_rate": LARGEST_STEP * tau, "beta1": beta1, "tau": tau}


_UNNAMED_RATES: dict[str, Callable[[float, float], dict[str, float]]] = {
    "momentum": lambda beta1, tau: {"learning_rate": 1 - beta1, "beta1": beta1},
    "adam": _bounded,
    "yogi": _bounded,
    "reptile": lambda beta1, tau: {"learning_rate": 2.0},
}


class Aggregation(Section):
    """``[aggregation]``: the rule, the weights, and the limits for a reply."""

    rule: RuleName = "fedavg"
    weights: Literal["examples", "uniform"] = "examples"
    server_optimizer: ServerOptimizer = ServerOptimizer()
    max_update_norm: float = Field(default=1000.0, gt=0)
    max_examples: int = Field(default=1_000_000, ge=1)
