"""Whom faults hit, when, and what they do: drawn by hash, so that a rehearsal can be repeated.

A draw depends on the job's seed, the fault, the round, the attempt at it and the site, and on
nothing else: not on the order of messages, the process, or where a run was resumed.

Poisoned labels are those of Fang et al., "Local Model Poisoning Attacks to Byzantine-Robust
Federated Learning" (USENIX Security 2020), with one change: they turn label l of C into C - 1 - l,
which leaves the middle one of an odd number as it is; here l becomes l + 1 modulo C, so that all
are wrong. Flipped signs: Karimireddy et al., "Byzantine-Robust Learning on Heterogeneous Datasets
via Bucketing" (arXiv:2006.09365); signs and noise: Li et al., "RSA" (AAAI 2019).
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
    """A round's ``train`` or its ``evaluate`` (``work``); ``attempt`` counts from 0."""

    round: int
    attempt: int
    work: str


@dataclass(frozen=True)
class Fates:
    """What befalls the sites of one job; ``slow`` and ``poisoned`` are names, sorted."""

    settings: Faults
    seed: int
    slow: tuple[str, ...]
    poisoned: tuple[str, ...]

    @classmethod
    def draw(cls, job: Job, sites: Sequence[str]) -> Self:
        """The fates of ``sites``, by name."""
        settings = job.simulation.faults if job.simulation else Faults()
        seed = job.job.seed
        slow = choose_sites(sites, settings.stragglers, seed, "slow")
        return cls(settings, seed, slow, choose_sites(sites, settings.poisoned, seed, "poisoned"))

    def vanishes(self, step: Step, site: str) -> int:
        """The stage (0 to 4, as in a masked round) from which ``site`` is gone, or ``NEVER``.

        One draw for a round's training and evaluation: who is gone stays away until the next.
        """
        draw = numpy_generator(self.seed, "fault", "dropout", step.round, step.attempt, site)
        return int(draw.integers(STAGES)) if draw.random() < self.settings.dropout else NEVER

    def delay(self, step: Step, site: str) -> float:
        """Seconds by which the reply of ``site`` is late; each reply of a slow site has its own."""
        if site not in self.slow:
            return 0.0
        number = (step.round, step.attempt, step.work)
        draw = numpy_generator(self.seed, "fault", "delay", *number, site)
        return float(draw.exponential(self.settings.delay))

    def poison(self, update: Vector, step: Step, site: str) -> Vector:
        """What becomes of the update of ``site``, float32 [n], on its way to the coordinator."""
        if not self.settings.poisons_updates or site not in self.poisoned:
            return update
        if self.settings.poison == "sign-flip":
            return -update
        if self.settings.poison == "nan":
            return np.full_like(update, np.nan)
        draw = numpy_generator(self.seed, "fault", "noise", step.round, step.attempt, site)
        noise = draw.standard_normal(update.size)
        length = np.linalg.norm(update.astype(np.float64))  # its own: the norm gives nothing away
        return (noise * (length / np.linalg.norm(noise))).astype(np.float32)

    def facts(self) -> dict[str, Any]:
        """Settings and sites, as plain JSON values."""
        sites = {"slow_sites": list(self.slow), "poisoned_sites": list(self.poisoned)}
        return {**self.settings.model_dump(mode="json"), **sites}

    def summary(self, events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Facts and ``told``, and of a run's ``events`` the seconds each round would have waited.

        A stage that was done again after a crash waited as long as the first time: it counts once.
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
        """One line for people."""
        settings, parts = self.settings, []
        if settings.dropout:
            parts.append(f"a site vanishes in {100 * settings.dropout:g} % of rounds")
        if self.slow:
            parts.append(f"slow by {settings.delay:g} s on average: {', '.join(self.slow)}")
        if self.poisoned:
            parts.append(f"poisoned ({settings.poison}): {', '.join(self.poisoned)}")
        return "faults on purpose: " + "; ".join(parts)


def choose_sites(sites: Sequence[str], share: float, seed: int, purpose: str) -> tuple[str, ...]:
    """A ``share`` (0 to 1) of ``sites``, by the smallest hashes; at least one if it is above 0."""
    count = max(1, round(share * len(sites))) if share else 0
    ranked = sorted(sites, key=lambda site: derive_seed(seed, "fault", purpose, site))
    return tuple(sorted(ranked[:count]))


def wrong_labels(labels: Indices, classes: int) -> Indices:
    """The ``labels`` of a poisoned site, int64 [n]: every one is another than it was."""
    return (labels + 1) % classes
