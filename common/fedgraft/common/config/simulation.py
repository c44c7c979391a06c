"""``[simulation]``: the simulated sites of a run without real sites."""

from typing import Annotated, Literal

from pydantic import Field

from fedgraft.common.config.faults import Faults
from fedgraft.common.section import Cache, Section

__all__ = ["Actor", "CentralTraining", "Partition", "Simulation"]

Baseline = Literal["zero_shot", "head_only", "local_only", "central"]
BASELINES: tuple[Baseline, ...] = ("zero_shot", "head_only", "local_only", "central")


class Partition(Section):
    """The split of one data set over the sites of a simulation.

    ``dirichlet``: each class is distributed over the sites by Dirichlet(alpha) (Hsu et al. 2019).
    ``iid``: examples are distributed evenly. ``natural``: each folder or file that ``train``
    matches is one site.
    """

    kind: Literal["dirichlet", "iid", "natural"] = "dirichlet"
    alpha: float = Field(default=0.5, gt=0)
    min_examples: int = Field(default=2, ge=1)


class CentralTraining(Section):
    """Settings of central training that differ from a site's settings (absent: the same)."""

    learning_rate: float | None = Field(default=None, gt=0)
    batch_size: int | None = Field(default=None, ge=1)


class Actor(Section):
    """The resources of one Ray process; several processes share a GPU with e.g. ``gpus = 0.25``."""

    cpus: float = Field(default=1.0, gt=0)
    gpus: float = Field(default=1.0, gt=0, description="if the device is a GPU")


class Simulation(Section):
    """``[simulation]``: the settings of simulated sites; this section is never sent to a site."""

    sites: int | None = Field(default=None, ge=1, description="from the data if natural")
    train: str
    test: str | None = None
    partition: Partition = Partition()
    shift: Literal["none", "image"] = "none"
    baselines: tuple[Baseline, ...] = BASELINES
    central: CentralTraining = CentralTraining()
    finetune_epochs: int = Field(default=2, ge=0, description="federated, then tuned at each site")
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    workers: int | None = Field(default=None, ge=0, description="processes; the cores if absent")
    sites_per_pass: Literal["auto"] | Annotated[int, Field(strict=True, ge=1, le=256)] = Field(
        default="auto", description="trained side by side in one pass over the backbone"
    )
    teacher: str | None = Field(
        default=None, pattern=r"^(hf|path|builtin):.+$", description="of every site, to distil from"
    )
    unlabelled: tuple[str, ...] = Field(
        default=(), description="sites whose training rows have no labels"
    )
    ranks: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="LoRA ranks of sites, in turn; method.rank if empty"
    )
    cache: Cache = Field(default=Cache(memory=64_000_000), description="memory: of all processes")
    faults: Faults = Faults()
    actor: Actor = Actor()
