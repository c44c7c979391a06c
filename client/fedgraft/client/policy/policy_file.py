"""The site's policy, ``policy.toml``: everything that a job may ask of this site.

The site writes this file and reads it; no message changes it. Everything that is not allowed is
refused: if the file names no backbones, methods or metrics, none is allowed. Every key that can
refuse a job has a reason code, and the coordinator learns only this code. ``round_to`` and
``keep_sent`` refuse nothing.
"""

import hashlib
import json
import re
import tomllib
from dataclasses import dataclass
from datetime import datetime, time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from fedgraft.common.config.job import Job
from fedgraft.common.errors import JobError, SiteFailure
from fedgraft.common.methods import METHODS
from fedgraft.common.privacy import FEWEST
from fedgraft.common.section import IllegalJob, Section, Size
from fedgraft.common.toml import explain_problem, read_text

__all__ = ["Hours", "Policy", "RoundFacts", "check_plan", "load_policy"]

Metric = Literal["loss", "accuracy", "f1", "scores", "groups"]
METRICS: tuple[Metric, ...] = ("loss", "accuracy", "f1")
if TYPE_CHECKING:
    Allowed = str
else:  # every method, and the things that may train or travel beside one
    Allowed = Literal[(*METHODS, "domain", "consolidation")]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
EPSILON, DELTA = 8.0, 1e-5
RULES = {
    "backbone": "model.allowed_backbones",
    "method": "model.allowed_methods",
    "domain": "model.allowed_methods",
    "consolidation": "model.allowed_methods",
    "rank": "model.max_rank",
    "secure-aggregation": "privacy.secure_aggregation",
    "cohort": "privacy.min_cohort",
    "colluding": "privacy.max_colluding",
    "epsilon": "privacy.max_epsilon_total",
    "examples": "privacy.min_examples",
    "steps": "privacy.min_local_steps",
    "rounds": "limits.max_rounds",
    "bytes": "limits.max_bytes_out_per_round",
    "hours": "limits.hours",
    "metrics": "metrics.allowed",
}
"""The key of ``policy.toml`` that a rule is about, by the rule's code."""
CLOCKS = re.compile(r"((?:[01]\d|2[0-3]):[0-5]\d)-((?:[01]\d|2[0-3]):[0-5]\d)")


class Hours(Section):
    """The time from ``start`` until before ``end`` on this machine's clock, also over midnight."""

    start: time
    end: time

    def include(self, now: time) -> bool:
        """Return whether ``now`` is in these hours."""
        if self.start < self.end:
            return self.start <= now < self.end
        return now >= self.start or now < self.end

    def __str__(self) -> str:
        return f"{self.start:%H:%M}-{self.end:%H:%M}"


def _hours(value: object) -> object:
    """Turn ``"20:00-06:00"`` into Hours."""
    found = CLOCKS.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None or found[1] == found[2]:
        raise IllegalJob("no span of hours", 'write hours as "20:00-06:00"')
    return {"start": time.fromisoformat(found[1]), "end": time.fromisoformat(found[2])}


class ModelRules(Section):
    """``[model]``: backbones by name, each with the SHA-256 of its manifest or its fingerprint."""

    allowed_backbones: dict[str, Digest] = Field(default_factory=dict)
    allowed_methods: tuple[Allowed, ...] = ()
    max_rank: int = Field(default=16, ge=1)


class PrivacyRules(Section):
    """``[privacy]``: masked or clear updates, the number of sites, the amount of data.

    No job has differential privacy yet. So no job spends epsilon, and no job can be held to a
    bound: ``max_epsilon_total`` and ``delta`` may be written only with their default values.
    """

    secure_aggregation: Literal["required", "allowed"] = "required"
    min_cohort: int = Field(default=3, ge=1)
    max_colluding: int = Field(default=1, ge=0, description="sites a sum must be safe from")
    max_epsilon_total: float = Field(default=EPSILON, gt=0)
    delta: float = Field(default=DELTA, gt=0, lt=1)
    min_examples: int = Field(default=200, ge=1)
    min_local_steps: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _bounds_nothing_yet(self) -> Self:
        if (self.max_epsilon_total, self.delta) != (EPSILON, DELTA):
            raise IllegalJob(
                "no job has differential privacy yet, so nothing could keep to another "
                "max_epsilon_total or delta than the default",
                f"leave them out, or max_epsilon_total = {EPSILON} and delta = {DELTA}",
            )
        return self


class Limits(Section):
    """``[limits]``: rounds, bytes and hours; ``keep_sent`` rounds stay in ``state/sent``.

    Work begins only within ``hours``. Its reply may leave after them, and a result may come after
    them.
    """

    max_rounds: int = Field(default=50, ge=1)
    max_bytes_out_per_round: Size = 20_000_000
    hours: Annotated[Hours, BeforeValidator(_hours)] | None = None
    keep_sent: int = Field(default=3, ge=0)


class MetricRules(Section):
    """``[metrics]``: the metrics that a reply in clear may reveal.

    Losses are rounded to ``round_to`` decimals.
    """

    allowed: tuple[Metric, ...] = ()
    round_to: int = Field(default=3, ge=0, le=15)


class Approval(Section):
    """``[approval]``: whether a person must approve each job that the other rules allow."""

    mode: Literal["ask", "auto"] = "ask"


class Policy(Section):
    """All of ``policy.toml``."""

    model: ModelRules = ModelRules()
    privacy: PrivacyRules = PrivacyRules()
    limits: Limits = Limits()
    metrics: MetricRules = MetricRules()
    approval: Approval = Approval()

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) over the policy as canonical JSON: its content, not its form."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def in_words(self) -> tuple[str, ...]:
        """Return the policy as plain sentences, one for each rule."""
        model, privacy, limits = self.model, self.privacy, self.limits
        masked = privacy.secure_aggregation == "required"
        clear = ", ".join(self.metrics.allowed) or "no metric at all"
        return (
            f"Backbones allowed: {', '.join(sorted(model.allowed_backbones)) or 'none'}.",
            f"Methods allowed: {', '.join(model.allowed_methods) or 'none'}; "
            f"LoRA rank up to {model.max_rank}.",
            "Updates leave only masked: the coordinator sees sums over sites."
            if masked
            else "Updates may leave in clear: the coordinator may see this site's own.",
            f"A round has at least {privacy.min_cohort} sites; a masked sum is safe from the "
            f"coordinator with {privacy.max_colluding} of them.",
            "Jobs have no differential privacy yet: max_epsilon_total and delta bound nothing.",
            f"Training needs at least {privacy.min_examples} examples here and "
            f"{privacy.min_local_steps} steps a round.",
            f"At most {limits.max_rounds} rounds a run and "
            f"{limits.max_bytes_out_per_round / 1e6:g} MB out a round.",
            f"Work is taken up between {limits.hours.start:%H:%M} and {limits.hours.end:%H:%M} "
            "on this machine's clock."
            if limits.hours
            else "Work is taken up at any hour.",
            f"What was sent is kept for {limits.keep_sent} rounds.",
            f"In clear may be revealed: {clear}; losses to {self.metrics.round_to} decimals. "
            "In masked rounds only sums over sites leave.",
            "A person here approves every job."
            if self.approval.mode == "ask"
            else "A job within this policy needs no person's approval.",
        )


@dataclass(frozen=True)
class RoundFacts:
    """The facts that a policy judges, as far as they are known at a stage.

    ``digests`` identify the backbone that the coordinator claims. ``now`` is local time. ``round``
    is 0 at PLAN. ``works`` is False if the request only asks to keep a result. ``cohort`` is the
    number of sites that begin a masked round, ``survivors`` the number of sites in its sum,
    ``bytes_out`` the number of bytes that a round would send. ``examples`` is the number that this
    site would train on, and ``documents`` the number of texts or files that they are of: a long
    text is many blocks of one person. A number that is not known yet is None.
    """

    job: Job
    now: datetime
    digests: frozenset[str] | None = None
    round: int = 0
    works: bool = True
    cohort: int | None = None
    survivors: int | None = None
    bytes_out: int | None = None
    examples: int | None = None
    documents: int | None = None
    epsilon: float = 0.0


def check_plan(policy: Policy, facts: RoundFacts) -> None:
    """Check a job, or a round of it, against the policy.

    A job without differential privacy spends no ``epsilon``. This says nothing about what its
    updates reveal.

    Raises:
        SiteFailure: ``policy-`` and the code of the first rule that does not hold.
    """
    for code, holds in _rules(policy, facts):
        if not holds:
            raise SiteFailure(f"policy-{code}", _told(policy, facts, code))


def _told(policy: Policy, facts: RoundFacts, code: str) -> str:
    """Return what this site's own people read about a rule that does not hold."""
    section, _, key = RULES[code].partition(".")
    value = getattr(getattr(policy, section), key)
    shown = ", ".join(sorted(map(str, value))) if isinstance(value, tuple | dict) else value
    there = ""
    if code == "examples" and facts.documents is not None:
        there = f"; there are {facts.documents:,} texts or files to train on"
    if code == "steps":
        there = f"; there would be {_steps(facts.job, facts.examples)}"
    return f"policy-{code}: policy.toml has [{section}] {key} = {shown or 'none'}{there}"


def _rules(policy: Policy, facts: RoundFacts) -> tuple[tuple[str, bool], ...]:
    """Return every rule's code, and whether the rule holds."""
    job, model, privacy, limits = facts.job, policy.model, policy.privacy, policy.limits
    cohort, hours = _fewest(facts), limits.hours
    steps = _steps(job, facts.examples)
    return (
        ("backbone", facts.digests is None or _is_allowed(model, job, facts.digests)),
        ("method", job.method.kind in model.allowed_methods),
        ("domain", job.training.domain is None or "domain" in model.allowed_methods),
        ("consolidation", _allows_consolidation(model, job)),
        ("rank", job.method.low_rank <= model.max_rank),
        ("secure-aggregation", _masks(job) or privacy.secure_aggregation == "allowed"),
        ("cohort", min(cohort, facts.survivors or cohort) >= privacy.min_cohort),
        ("colluding", not _masks(job) or _withstands(job, cohort) >= privacy.max_colluding),
        ("epsilon", facts.epsilon <= privacy.max_epsilon_total),
        ("examples", facts.documents is None or facts.documents >= privacy.min_examples),
        ("steps", steps is None or steps >= privacy.min_local_steps),
        ("rounds", facts.round <= job.rounds.count <= limits.max_rounds),
        ("bytes", (facts.bytes_out or 0) <= limits.max_bytes_out_per_round),
        ("hours", hours is None or not facts.works or hours.include(facts.now.time())),
        ("metrics", _masks(job) or _revealed(job) <= set(policy.metrics.allowed)),
    )


def _allows_consolidation(model: ModelRules, job: Job) -> bool:
    return job.training.consolidation is None or "consolidation" in model.allowed_methods


def _masks(job: Job) -> bool:
    return job.privacy.secure_aggregation.enabled


def _is_allowed(model: ModelRules, job: Job, digests: frozenset[str]) -> bool:
    """Return whether the policy allows the backbone, by its name and by its digest.

    Digests are compared after a fetch, so the name keeps a coordinator from having other things
    fetched. The digest of a manifest is sufficient alone.
    """
    source = job.backbone.source
    if source.startswith("manifest:"):
        digests |= {source.removeprefix("manifest:")}
        return any(
            one.removeprefix("sha256:") in digests for one in model.allowed_backbones.values()
        )
    path = source.partition(":")[2]
    names = {source, path, path.partition("@")[0], path.partition("@")[0].rpartition("/")[2]}
    allowed = (model.allowed_backbones[name] for name in names if name in model.allowed_backbones)
    return any(digest.removeprefix("sha256:") in digests for digest in allowed)


def _fewest(facts: RoundFacts) -> int:
    """Return the number of sites of a round; if it is not known yet, the fewest for the job."""
    if facts.cohort is not None:
        return facts.cohort
    least = facts.job.rounds.min_sites
    return max(least, FEWEST) if _masks(facts.job) else least


def _withstands(job: Job, cohort: int) -> int:
    """Return how many sites can collude with the coordinator and not open a sum of ``cohort``."""
    return job.privacy.secure_aggregation.numbers(cohort)[0]


def _steps(job: Job, examples: int | None) -> int | None:
    if examples is None:
        return None
    return job.training.epochs * -(-examples // job.training.batch_size)


def _revealed(job: Job) -> set[Metric]:
    """Return the metrics that replies in clear reveal.

    These are the training loss, and accuracy and F1 by a confusion matrix. Binned scores and the
    right answers in each group are revealed only if the job counts them.
    """
    if not job.data.validation:
        return {"loss"}
    scores: set[Metric] = {"scores"} if job.evaluation.score_bins else set()
    groups: set[Metric] = {"groups"} if job.data.groups else set()
    return {*METRICS, *scores, *groups}


def load_policy(path: Path) -> Policy:
    """Load the ``policy.toml`` at ``path``.

    Raises:
        JobError: it is missing, is not UTF-8 TOML, or does not describe a policy.
    """
    if not path.exists():
        raise JobError(f"no file {path}", hint="the federation's kit has one to start from")
    try:
        return Policy.model_validate(tomllib.loads(read_text(path)))
    except tomllib.TOMLDecodeError as error:
        raise JobError(f"{path} is not valid TOML: {error}", hint="mend that line") from None
    except ValidationError as error:
        problems = [_explain(dict(item)) for item in error.errors()]
    lines = dict.fromkeys(f"{path}: {what}" for what, _ in problems)
    raise JobError("\n".join(lines), hint="; ".join(dict.fromkeys(hint for _, hint in problems)))


def _explain(problem: dict[str, Any]) -> tuple[str, str]:
    """Return one pydantic problem as (what is wrong, what to do)."""
    loc = problem["loc"]
    if loc[:2] == ("model", "allowed_backbones"):
        return f"{'.'.join(map(str, loc))} is no digest", 'NAME = "sha256:" and 64 hex digits'
    return explain_problem(problem, Policy)
