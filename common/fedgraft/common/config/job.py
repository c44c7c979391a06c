"""The job file: what to train, in one frozen object that coordinator, sites and simulation share.

Only the meaning of a job lives here; reading it from TOML, overriding it and explaining what is
wrong with it is ``jobfile.py``. A ``Job`` that exists is consistent: illegal pairs do not validate.
"""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from fedgraft.common.config.adapting import check_domain, check_plain_mean
from fedgraft.common.config.data import Data
from fedgraft.common.config.evaluation import Evaluation
from fedgraft.common.config.simulation import Simulation
from fedgraft.common.config.training import Training
from fedgraft.common.config.unlabelled import check_unlabelled
from fedgraft.common.methods import Method
from fedgraft.common.metrics.measures import Measures
from fedgraft.common.privacy import Privacy
from fedgraft.common.section import Duration, IllegalJob, Section
from fedgraft.common.tasks import TASKS, TaskName

__all__ = [
    "Aggregation",
    "Backbone",
    "EarlyStopping",
    "Job",
    "Rounds",
    "ServerOptimizer",
    "Start",
]

PATCHES = 4096  # of an image: none has more
Rule = Literal["fedavg", "ffa", "fedsa", "median"]
# Rules that must see each site's own update; the others need only the weighted sum of them.
INDIVIDUAL: frozenset[Rule] = frozenset({"median"})


class General(Section):
    """``[job]``: the name, the task and its labels, and the seed everything random comes from."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    task: TaskName
    labels: tuple[str, ...] = Field(default=(), description="of a classification")
    heads: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="several tasks: the labels of each, every label in one"
    )
    seed: int = Field(default=0, ge=0, lt=2**62)

    @property
    def head_of(self) -> tuple[int, ...]:
        """Of each label the number of its head; empty with one for all."""
        numbers = {label: n for n, labels in enumerate(self.heads.values()) for label in labels}
        return tuple(numbers[label] for label in self.labels) if numbers else ()

    @property
    def classes(self) -> int:
        """Rows of a confusion matrix: the labels, or for tokens the right and the wrong ones."""
        return len(self.labels) or 2

    @model_validator(mode="after")
    def _labels_fit(self) -> Self:
        if TASKS[self.task].target != "label":
            if self.labels:
                raise IllegalJob(f"{self.task} has no labels", "leave job.labels out")
        elif len(self.labels) < 2:
            raise IllegalJob(f"{self.task} needs at least two labels", "name them in job.labels")
        return self

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        twice = sorted({name for name in self.labels if self.labels.count(name) > 1})
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
    """``[backbone]``: the frozen model; ``weights = "random"`` takes only its ``config.json``.

    ``quantize`` says in how many bits sites keep its frozen linear layers while they compute.
    """

    source: str = Field(pattern=r"^((hf|path|builtin):.+|manifest:[0-9a-f]{64})$")
    weights: Literal["pretrained", "random"] = "pretrained"
    quantize: Literal["none", "8bit", "4bit"] = "none"

    @property
    def bits(self) -> int:
        """Bits of a frozen linear layer's weight; 0 where it stays as it is."""
        return {"none": 0, "8bit": 8, "4bit": 4}[self.quantize]


class Start(Section):
    """``[start]``: go on from the adapter of an earlier run, as ``fedgraft export`` writes it.

    Without ``head`` the head starts anew, where the labels are others. Only the coordinator reads
    the folder: sites get its adapter in the first round.
    """

    adapter: str = Field(min_length=1)
    head: bool = True


class EarlyStopping(Section):
    """Stop when federated validation has not improved for ``patience`` evaluations."""

    metric: Literal["loss", "accuracy", "macro_f1"] = "loss"
    patience: int = Field(default=3, ge=1)
    min_delta: float = Field(default=0.0, ge=0)


class Rounds(Section):
    """``[rounds]``: how many, with whom, and how long to wait for them."""

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
        """Whether rounds can work with ``sites`` sites.

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
        """Sites asked in a round when ``sites`` are present (at least one)."""
        if self.fraction is not None:
            return max(1, round(self.fraction * sites))
        return min(sites, self.cohort) if self.cohort is not None else sites


class ServerOptimizer(Section):
    """How the aggregate moves the global adapter (Reddi et al. 2021, "Adaptive Federated Opt.")."""

    kind: Literal["none", "momentum", "adam", "yogi", "reptile"] = "none"
    learning_rate: float = Field(default=1.0, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)
    tau: float = Field(default=1e-3, gt=0)


class Aggregation(Section):
    """``[aggregation]``: the rule, the weights, and what a reply may at most be."""

    rule: Rule = "fedavg"
    weights: Literal["examples", "uniform"] = "examples"
    server_optimizer: ServerOptimizer = ServerOptimizer()
    max_update_norm: float = Field(default=1000.0, gt=0)
    max_examples: int = Field(default=1_000_000, ge=1)


class Job(Section):
    """One job; everything random in it is derived from ``job.seed``."""

    job: General
    backbone: Backbone
    method: Annotated[Method, Field(discriminator="kind")]
    training: Training = Training()
    start: Start | None = None
    rounds: Rounds = Rounds()
    aggregation: Aggregation = Aggregation()
    privacy: Privacy = Privacy()
    data: Data = Data()
    evaluation: Evaluation = Evaluation()
    simulation: Simulation | None = None

    @model_validator(mode="after")
    def _measures_fit(self) -> Self:
        if TASKS[self.job.task].target != "label":
            check_unlabelled(self)
        return self

    @model_validator(mode="after")
    def _domain_fits(self) -> Self:
        if self.training.domain is not None:
            check_domain(self)
        if self.training.domain is not None or self.training.consolidation is not None:
            check_plain_mean(self)
        return self

    @model_validator(mode="after")
    def _augmentation_fits(self) -> Self:
        augmentation, task = self.training.augmentation, TASKS[self.job.task]
        for modality in ("image", "text", "audio") if augmentation is not None else ():
            if getattr(augmentation, modality) and (
                modality != task.modality or task.target != "label"
            ):
                raise IllegalJob(
                    f"training.augmentation.{modality} means nothing for {self.job.task}",
                    f"training.augmentation.{task.modality}"
                    if task.target == "label" and task.modality != "video"
                    else "there is none for clips"
                    if task.target == "label"
                    else "leave it out: what is predicted is not to be varied",
                )
        return self

    @model_validator(mode="after")
    def _quantized_weights_fit(self) -> Self:
        if self.backbone.bits and getattr(self.method, "dora", False):
            raise IllegalJob(
                "method.dora needs the norms of frozen weights, and quantised they are not at hand",
                'backbone.quantize = "none", or method.dora = false',
            )
        return self

    @model_validator(mode="after")
    def _start_fits(self) -> Self:
        if self.start is not None and self.aggregation.rule == "ffa":
            raise IllegalJob(
                'rule "ffa" draws its frozen factors from the seed, and [start] brings others',
                'aggregation.rule = "fedavg"',
            )
        if self.start is not None and self.aggregation.rule == "fedsa":
            raise IllegalJob(
                'rule "fedsa" sends no factors B, and half of the adapter of [start] would be lost',
                'aggregation.rule = "fedavg"',
            )
        return self

    @model_validator(mode="after")
    def _ffa_fits(self) -> Self:
        if self.aggregation.rule == "ffa" and self.method.kind != "lora":
            raise IllegalJob(
                'rule "ffa" freezes LoRA\'s factor A, and method.kind = '
                f'"{self.method.kind}" has none',
                'aggregation.rule = "fedavg", or method.kind = "lora"',
            )
        if self.aggregation.rule == "ffa" and getattr(self.method, "dora", False):
            raise IllegalJob(
                'rule "ffa" averages exactly because a weight is linear in B, and with '
                "method.dora it is not",
                'aggregation.rule = "fedavg", or method.dora = false',
            )
        return self

    @model_validator(mode="after")
    def _fedsa_fits(self) -> Self:
        if self.aggregation.rule != "fedsa":
            return self
        if self.method.kind != "lora" or self.method.dora:
            what = "DoRA's magnitudes" if self.method.kind == "lora" else "no such pairs"
            raise IllegalJob(
                'rule "fedsa" shares LoRA\'s factor A and keeps its B, and this method has ' + what,
                'aggregation.rule = "fedavg", or method.kind = "lora" without dora',
            )
        if self.training.consolidation is not None:
            raise IllegalJob(
                'rule "fedsa" sends only one factor of each pair, and consolidation holds all',
                'aggregation.rule = "fedavg"',
            )
        return self

    @property
    def keeps_own(self) -> bool:
        """Whether each site keeps a part of its model to itself."""
        return self.method.head == "local" or self.aggregation.rule == "fedsa"

    @model_validator(mode="after")
    def _pairs_are_legal(self) -> Self:
        ranks = self.simulation.ranks if self.simulation is not None else ()
        if ranks and max(ranks) > getattr(self.method, "rank", 0):
            raise IllegalJob(
                f"simulation.ranks has {max(ranks)}, more than the job's own rank",
                "raise method.rank, the rank of the shared adapter"
                if self.method.kind == "lora"
                else f'leave simulation.ranks out: method.kind = "{self.method.kind}" has no rank',
            )
        if self.rounds.early_stopping and not self.data.validation:
            raise IllegalJob(
                "early_stopping watches federated validation, and data.validation = 0 leaves none",
                "data.validation = 0.1",
            )
        if self.rounds.early_stopping and self.keeps_own:
            what = "local heads" if self.method.head == "local" else "the sites' own factors"
            raise IllegalJob(
                f"early_stopping may go back to an earlier adapter, {what} do not go back",
                'method.head = "shared" and another rule than "fedsa", or no early_stopping',
            )
        if self.aggregation.rule in INDIVIDUAL and self.privacy.secure_aggregation.enabled:
            others = ", ".join(f'"{rule}"' for rule in get_args(Rule) if rule not in INDIVIDUAL)
            raise IllegalJob(
                f'rule "{self.aggregation.rule}" must see each site\'s own update, and secure '
                "aggregation shows the coordinator only their sum",
                f"aggregation.rule = one of {others}, "
                "or privacy.secure_aggregation.enabled = false",
            )
        if (
            self.training.distillation is not None
            and self.simulation is not None
            and self.simulation.teacher is None
        ):
            raise IllegalJob(
                "training.distillation needs a teacher at every site",
                'simulation.teacher = "path:MODEL", trained for the job\'s labels',
            )
        if self.simulation is not None and self.privacy.secure_aggregation.enabled:
            self.simulation.faults.check_masked()
        if self.simulation is not None and self.simulation.sites is not None:
            self.check_sites(self.simulation.sites)
        elif self.rounds.cohort is not None:
            self._check_cohort(self.rounds.cohort)
        return self

    @property
    def measures(self) -> Measures:
        """What an evaluation of this job counts."""
        evaluation = self.evaluation
        groups = self.data.groups
        target = TASKS[self.job.task].target
        parts = {"label": 0, "tokens": self.data.max_length, "patches": PATCHES}[target]
        return Measures(
            self.job.classes, evaluation.score_bins, groups, evaluation.min_group, parts, target
        )

    @property
    def masked_share(self) -> float:
        """The share of tokens or patches that is hidden where the task hides some."""
        if self.data.masked is not None:
            return self.data.masked
        return 0.6 if TASKS[self.job.task].target == "patches" else 0.15

    def check_sites(self, sites: int) -> None:
        """Whether rounds can work with ``sites`` sites.

        Raises:
            IllegalJob: the cohort would be too large or too small.
        """
        self.rounds.check_sites(sites)
        self._check_cohort(self.rounds.cohort_size(sites))
        if self.rounds.early_stopping:  # all of them evaluate
            self._check_cohort(sites)

    def _check_cohort(self, cohort: int) -> None:
        if self.privacy.secure_aggregation.enabled:
            self.privacy.secure_aggregation.plan(cohort)

    def for_sites(self) -> "Job":
        """The job as sites get it: without what names the coordinator's files.

        That it goes on from an earlier adapter they may know; which, they get in round 1.
        """
        start = None
        if self.start is not None:
            start = self.start.model_copy(update={"adapter": "of an earlier run"})
        return self.model_copy(update={"simulation": None, "start": start})
