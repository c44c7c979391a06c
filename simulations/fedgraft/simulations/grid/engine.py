"""The division of a simulation into passes: the number of sites that are trained in one pass.

The backbone is loaded once and shared by forked workers; sites are processed one after the other.
The number depends only on the job and the data, and not on the number of workers or their speed,
because the number of sites in a pass changes the last bits of a result.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from torch.utils.flop_counter import FlopCounterMode

from fedgraft.client.data.batches import as_tensors
from fedgraft.client.model.batched_model import check_stacking
from fedgraft.client.model.forward import logits_of, open_feed
from fedgraft.client.participant import open_participant
from fedgraft.common.config.job import Job
from fedgraft.common.errors import InputError
from fedgraft.simulations.data.partition import PreparedSites
from fedgraft.simulations.grid.identities import FILE
from fedgraft.simulations.grid.local_grid import NodeConfig
from fedgraft.simulations.grid.workers import Workers

__all__ = ["Nodes", "choose_sites_per_pass", "make_nodes"]

MOST = 32
SHARES = 4  # a cohort has at least this number of passes: idle cores cost more than small batches
PROBED = 8  # rows in the check that sites do not mix
# Floating-point operations of a forward pass above which more rows give no gain, measured on a CPU
# (docs/results.md); a GPU needs far more.
ENOUGH = {"fp32": 3e9, "bf16": 1.2e10}
ON_A_GPU = 1e12


@dataclass(frozen=True)
class Nodes(Sequence[NodeConfig]):
    """The nodes' configurations, made on request, because few of ten thousand are ever read.

    ``sites`` is the folder of the sites, ``states`` the folder of their states; ``extra`` are
    settings of all sites.
    """

    names: tuple[str, ...]
    sites: str
    states: str
    extra: tuple[tuple[str, str], ...]
    ranks: tuple[int, ...] = ()
    unlabelled: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[NodeConfig]:
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> NodeConfig: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[NodeConfig]: ...
    def __getitem__(self, index: int | slice) -> NodeConfig | Sequence[NodeConfig]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        name = self.names[index]
        node = {
            "site": f"{self.sites}/{name}/site.toml",
            "state": f"{self.states}/{name}",
            **dict(self.extra),
        }
        if name in self.unlabelled:
            node["unlabelled"] = "yes"
        if self.ranks:
            node["rank"] = str(self.ranks[index % len(self.ranks)])
        return node


def choose_sites_per_pass(job: Job, nodes: Sequence[NodeConfig]) -> int:
    """Return the number of sites per pass: the job's number, or enough to use the processor fully.

    Raises:
        InputError: the job asks for several sites, and the backbone would mix their rows.
    """
    asked = job.simulation.sites_per_pass if job.simulation else 1
    cohort = job.rounds.cohort_size(len(nodes))
    if asked == 1 or cohort == 1:
        return 1
    participant = open_participant(nodes[0])
    stack, examples = participant.stack(job), participant.splits(job).train
    if not len(examples):
        return 1
    size = job.training.batch_size // job.training.accumulation
    some = np.resize(np.arange(len(examples)), size)
    wanted = MOST if asked == "auto" else asked
    if asked == "auto":
        layout = stack.bench.layout
        feed = open_feed(stack, layout, examples, participant.store)
        stack.put_one(layout, stack.bench.initial)
        with FlopCounterMode(display=False) as counter:  # counts only what is not cached
            logits_of([feed], [some], feed.width(some))
        on_cpu = stack.device.type == "cpu"
        enough = ENOUGH[job.training.precision] if on_cpu else ON_A_GPU
        power = round(math.log2(enough / max(counter.get_total_flops(), 1)))
        wanted = min(wanted, -(-cohort // SHARES), 1 << max(power, 0))
    try:
        if stack.settle(examples).pad_left:  # a row would depend on other rows
            raise InputError(
                "texts are padded on the left here, by as much as the longest in the pass needs",
                hint="simulation.sites_per_pass = 1",
            )
        check_stacking(stack, as_tensors(stack.settle(examples).batch(some[:PROBED])))
    except InputError:
        if asked == "auto":
            return 1
        raise
    return min(wanted, cohort)


def make_nodes(job: Job, prepared: PreparedSites, *, states: str, device: str) -> Nodes:
    """Return the sites as Flower nodes; ``states`` is the folder of their states in this run."""
    settings = prepared.settings
    processes = 1 + Workers(settings.workers, device=device).count
    cache = settings.cache.model_copy(update={"memory": settings.cache.memory // processes})
    extra = [("device", device), ("cache", cache.model_dump_json())]
    if settings.teacher is not None:
        extra.append(("teacher", settings.teacher))
    if states and job.privacy.secure_aggregation.enabled:
        extra.append(("federation", f"{states}/{FILE}"))
    names = tuple(site.name for site in prepared.sites)
    unlabelled = frozenset(settings.unlabelled)
    if unknown := unlabelled.difference(names):
        raise InputError(
            f"simulation.unlabelled: there is no site {min(unknown)}",
            hint=f"there are: {', '.join(names[:8])}{', ...' if names[8:] else ''}",
        )
    return Nodes(names, str(prepared.folder), states, tuple(extra), settings.ranks, unlabelled)
