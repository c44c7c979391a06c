"""The plan of faults: affected sites, times and effects, drawn by hash and therefore repeatable.

A draw depends only on the job's seed, the fault, the round, the attempt at it and the site. It does
not depend on the order of messages, on the process, or on the round at which a run was resumed.

Poisoned labels follow Fang et al., "Local Model Poisoning Attacks to Byzantine-Robust Federated
Learning" (USENIX Security 2020), with one change. The paper turns label l of C into C - 1 - l,
which does not change the middle label if C is odd. Here l becomes l + 1 modulo C, so that all
labels are wrong. Flipped signs follow Karimireddy et al., "Byzantine-Robust Learning on
Heterogeneous Datasets via Bucketing" (arXiv:2006.09365). Signs and noise: Li et al., "RSA" (AAAI
2019).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from fedgraft.common.config.faults import Faults
from fedgraft.common.config.job import Job
from fedgraft.common.examples import Indices
from fedgraft.common.layout import Vector
from fedgraft.common.seeds import derive_seed, numpy_generator

__all__ = ["NEVER", "Fates", "Step", "choose_sites", "wrong_labels"]

STAGES = 5  # of a masked round: keys, shares, work, confirm, unmask
NEVER = STAGES


@dataclass(frozen=True)
class Step:
    """The ``work`` of a round, ``train`` or ``evaluate``; ``attempt`` counts from 0."""

    round: int
    attempt: int
    work: str


@dataclass(frozen=True)
class Fates:
    """The faults of one job's sites; ``slow`` and ``poisoned`` are site names, sorted."""

    settings: Faults
    seed: int
    slow: tuple[str, ...]
    poisoned: tuple[str, ...]

    @classmethod
    def draw(cls, job: Job, sites: Sequence[str]) -> Self:
        """Draw and return the faults of ``sites``, given by name."""
        settings = job.simulation.faults if job.simulation else Faults()
        seed = job.job.seed
        slow = choose_sites(sites, settings.stragglers, seed, "slow")
        return cls(settings, seed, slow, choose_sites(sites, settings.poisoned, seed, "poisoned"))

    def vanishes(self, step: Step, site: str) -> int:
        """Return the stage (0 to 4, as in a masked round) at which ``site`` vanishes, or ``NEVER``.

        There is one draw for a round's training and evaluation: a site that has vanished stays away
        until the next round.
        """
        draw = numpy_generator(self.seed, "fault", "dropout", step.round, step.attempt, site)
        return int(draw.integers(STAGES)) if draw.random() < self.settings.dropout else NEVER

    def delay(self, step: Step, site: str) -> float:
        """Return the seconds by which the reply of ``site`` is late, drawn for each reply."""
        if site not in self.slow:
            return 0.0
        number = (step.round, step.attempt, step.work)
        draw = numpy_generator(self.seed, "fault", "delay", *number, site)
        return float(draw.exponential(self.settings.delay))

    def poison(self, update: Vector, step: Step, site: str) -> Vector:
        """Return the update of ``site``, float32 [n], that the coordinator gets."""
        if not self.settings.poisons_updates or site not in self.poisoned:
            return update
        if self.settings.poison == "sign-flip":
            return -update
        if self.settings.poison == "nan":
            return np.full_like(update, np.nan)
        draw = numpy_generator(self.seed, "fault", "noise", step.round, step.attempt, site)
        noise = draw.standard_normal(update.size)
        length = np.linalg.norm(update.astype(np.float64))  # equal norms do not reveal the noise
        return (noise * (length / np.linalg.norm(noise))).astype(np.float32)

    def facts(self) -> dict[str, Any]:
        """Return settings and sites, as plain JSON values."""
        sites = {"slow_sites": list(self.slow), "poisoned_sites": list(self.poisoned)}
        return {**self.settings.model_dump(mode="json"), **sites}

    def summary(self, events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return facts and ``told``, and from ``events`` the seconds that each round would wait.

        A stage that is repeated after a crash waits as long as the first time, so it counts once.
        """
        stages = {
            tuple(event[key] for key in ("round", "attempt", "work", "stage")): event["seconds"]
            for event in events
            if event["event"] == "waited"
        }
        rounds: dict[int, float] = {}
        for (number, *_), seconds in sorted(stages.items()):
            rounds[number] = rounds.get(number, 0.0) + seconds
        waits = [{"round": number, "seconds": seconds} for number, seconds in rounds.items()]
        return {
            **self.facts(),
            "told": self.describe(),
            "waits": waits,
            "waited": sum(rounds.values()),
            "longest_wait": max(waits, key=lambda wait: wait["seconds"], default=None),
        }

    def describe(self) -> str:
        """Return the faults as one line of text."""
        settings, parts = self.settings, []
        if settings.dropout:
            parts.append(f"a site vanishes in {100 * settings.dropout:g} % of rounds")
        if self.slow:
            parts.append(f"slow by {settings.delay:g} s on average: {', '.join(self.slow)}")
        if self.poisoned:
            parts.append(f"poisoned ({settings.poison}): {', '.join(self.poisoned)}")
        return "faults on purpose: " + "; ".join(parts)


def choose_sites(sites: Sequence[str], share: float, seed: int, purpose: str) -> tuple[str, ...]:
    """Return a ``share`` (0 to 1) of ``sites``, those with the smallest hashes, sorted.

    There is at least one site if the share is above 0.
    """
    count = max(1, round(share * len(sites))) if share else 0
    ranked = sorted(sites, key=lambda site: derive_seed(seed, "fault", purpose, site))
    return tuple(sorted(ranked[:count]))


def wrong_labels(labels: Indices, classes: int) -> Indices:
    """Return the ``labels`` of a poisoned site, int64 [n]; every label is wrong."""
    return (labels + 1) % classes
