"""Several tasks in one job: each row is judged by the labels of its own head alone."""

from pathlib import Path

import numpy as np
import pytest
from support.evaluations import measured_labels
from support.federations import digits_job, run_digits

from fedgraft.client.participant import open_participant
from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.errors import JobError
from fedgraft.simulations.grid.engine import make_nodes
from fedgraft.simulations.preparation import prepare

HEADS = "job.heads={even=['0','2','4','6','8'], odd=['1','3','5','7','9']}"


def test_predictions_are_of_a_rows_own_head() -> None:
    found = {}
    for overrides in ((HEADS,), ()):
        job = digits_job(*overrides)
        node = make_nodes(job, prepare(job), states="", device="cpu")[0]
        site = open_participant(node)
        bench, examples = open_workbench(job), site.splits(job).test
        assert bench.heads == ((0, 1) * 5 if overrides else ())
        found[bool(overrides)] = measured_labels(
            site.stack(job), bench.layout, bench.initial, examples, job.measures
        )
    both, one = found[True], found[False]
    assert np.array_equal(both.true % 2, both.predicted % 2)
    assert not np.array_equal(one.true % 2, one.predicted % 2)
    assert both.tally.loss < one.tally.loss  # there is less to be wrong about
    assert both.correct.sum() > one.correct.sum()


def test_a_federation_of_two_tasks_runs_and_learns(tmp_path: Path) -> None:
    run, _ = run_digits(tmp_path, HEADS, "rounds.count=2")
    losses = [one["train_loss"] for one in run.history()]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("heads", "why"),
    [
        ("{even=['0','2','4','6','8']}", "differ: 1, 3"),
        ("{a=['0','2','4','6','8','x'], b=['1','3','5','7','9']}", "differ: x"),
        ("{a=['0','2','4','6','8','1'], b=['1','3','5','7','9']}", "differ: 0, 1"),
        ("{a=['0'], b=['1','2','3','4','5','6','7','8','9']}", "fewer than two"),
    ],
)
def test_heads_divide_the_labels(heads: str, why: str) -> None:
    with pytest.raises(JobError, match=why):
        digits_job(f"job.heads={heads}")
