"""What a task refuses is a feature that jobs can have, is said in words, and is refused."""

from typing import get_args

import pytest
from support.contract_refusals import ASKS, VERBS, check_asked, check_texts
from support.contract_tasks import TaskCase

from fedgraft.common.config.compatibility import FEATURES, refusal_of
from fedgraft.common.config.sections import EarlyStopping
from fedgraft.common.errors import JobError
from fedgraft.common.metrics.tally import Tally


def test_every_feature_can_be_asked_for() -> None:
    assert ASKS.keys() | VERBS == FEATURES.keys()
    assert not ASKS.keys() & VERBS


def test_each_refusal_is_of_a_feature_and_can_be_told(case: TaskCase) -> None:
    check_texts(case.task.refuses, case.job)
    assert not any(has(case.job) and refusal_of(case.job, f) for f, has in FEATURES.items())


def test_a_job_that_asks_for_what_is_refused_is_refused(case: TaskCase) -> None:
    check_asked(case.task.refuses, case.ask)


def test_what_early_stopping_may_watch_is_measured(case: TaskCase) -> None:
    measures = case.job.measures
    measured = measures.figures(Tally.empty(measures))
    own = {"loss", *(metric.key for metric in case.task.watched)}
    assert own >= {metric.key for metric in case.task.metrics}
    for metric in get_args(EarlyStopping.model_fields["metric"].annotation):
        over = {"rounds": {"early_stopping": {"metric": metric}}}
        if metric in own:
            assert metric in measured, metric
            stopping = case.ask(over).rounds.early_stopping
            assert stopping is not None and abs(stopping.score(measured)) >= 0
        else:
            with pytest.raises(JobError, match=f"has no {metric} to stop early by") as caught:
                case.ask(over)
            assert '"loss"' in caught.value.hint
