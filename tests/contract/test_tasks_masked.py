"""A masked round of any task is the round in clear, and its sums are the same numbers."""

from pathlib import Path

import numpy as np
import pytest
from support.contract import MASKED, OneRound, distance
from support.contract_tasks import TaskCase, write_sites

from fedgraft.common.config.job import Job


@pytest.fixture(scope="module")
def jobs(case: TaskCase) -> tuple[Job, Job]:
    """The task's job for three sites, in clear and masked, none evaluated after round 1 of 2."""
    folder = case.folder / "three"
    write_sites(case.job, folder, 3)
    sites = {"train": f"{folder}/*/train/rows.jsonl", "test": f"{folder}/*/test/rows.jsonl"}
    over = {"simulation": sites, "rounds": {"evaluate_every": 2}}
    return case.ask(over), case.ask({**over, "privacy": MASKED})


def test_masked_is_clear_and_counts_are_exactly_equal(
    jobs: tuple[Job, Job], tmp_path: Path
) -> None:
    clear, masked = (OneRound(job, tmp_path / str(at)) for at, job in enumerate(jobs))
    assert masked.record.sites == clear.record.sites == 3
    assert masked.record.masked is not None and clear.record.masked is None
    assert masked.record.masked["clipped"] == 0.0
    bound, start = masked.record.masked["error_bound"], clear.start.adapter
    moved = distance(clear.state.adapter, start)
    assert 0 < bound < moved / 10
    assert distance(masked.state.adapter, clear.state.adapter) <= bound + 1e-7
    assert masked.record.examples == clear.record.examples
    assert masked.record.train_loss == pytest.approx(clear.record.train_loss, rel=1e-3)

    ours, theirs = (one.count(clear.state.adapter) for one in (masked, clear))
    assert not ours.traffic.dropped and not theirs.traffic.dropped
    assert ours.tally.examples == theirs.tally.examples > 0
    assert np.array_equal(ours.tally.counts, theirs.tally.counts)
    # Each site's loss is rounded to a level of the masked sum, whatever its size is.
    assert ours.tally.loss == pytest.approx(theirs.tally.loss, rel=1e-3, abs=0.05)
