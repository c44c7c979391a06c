"""Sites that can be trained alone or in company, to compare the two."""

from collections.abc import Sequence

import numpy as np
import pytest
from support.trainings import felt, noisy, rows_for, task

from fedgraft.client.model.batched_model import Stack
from fedgraft.client.training.trainer import Span, Trained, TrainingTask, train
from fedgraft.common.config.training import Training
from fedgraft.common.errors import SiteFailure
from fedgraft.common.examples import Examples
from fedgraft.common.layout import Layout

__all__ = ["CLOSE", "TURNED", "UNEVEN", "Company", "uneven"]

CLOSE = 1e-5
# More padding before a text turns its rotary positions, and AdamW makes a whole step of a gradient
# that is next to nothing: single numbers differ more.
TURNED = {"llama": 5e-4}
UNEVEN = (7, 1, 26, 16)  # one, one, four and two batches of eight, partial ones among them


class Company:
    """Sites with rows, a start and a generator each, to be trained alone or together."""

    def __init__(
        self, stack: Stack, rows: Sequence[Examples], wanted: Training, layout: Layout | None = None
    ) -> None:
        self.stack, self.rows, self.wanted = stack, rows, wanted
        self.layout = layout or stack.bench.layout
        self.starts = [
            noisy(stack.bench, self.layout, seed=100 + site) for site in range(len(rows))
        ]
        self.span = Span(0.2, 0.7)

    def task(self, site: int) -> TrainingTask:
        return task(self.rows[site], self.starts[site].copy(), seed=site)

    def run(self, sites: Sequence[int]) -> list[Trained | SiteFailure]:
        tasks = [self.task(site) for site in sites]
        return train(self.stack, self.layout, tasks, settings=self.wanted, span=self.span)

    def together(self, sites: Sequence[int] | None = None) -> list[Trained]:
        found = self.run(sites if sites is not None else range(len(self.rows)))
        assert all(isinstance(one, Trained) for one in found), found
        return [one for one in found if isinstance(one, Trained)]

    def alone(self) -> list[Trained]:
        return [self.together([site])[0] for site in range(len(self.rows))]

    def check(self, close: float = CLOSE) -> list[Trained]:
        """Check that company makes no difference; what each site came to."""
        together, alone = self.together(), self.alone()
        for site, (one, other) in enumerate(zip(together, alone, strict=True)):
            assert np.abs(one.vector - self.starts[site]).max() > 1e-4
            off = np.abs(one.vector - other.vector)[felt(self.layout)]
            assert off.max() <= close and off.mean() < CLOSE / 10
            assert one.loss == pytest.approx(other.loss, abs=CLOSE)
            assert one.steps == other.steps
        return together


def uneven(kind: str, sizes: Sequence[int] = UNEVEN) -> list[Examples]:
    return [rows_for(kind, size, site + 1) for site, size in enumerate(sizes)]
