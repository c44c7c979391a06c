"""Figures of numbers follow from sums over sites; verdicts are in the target's unit."""

import json
import math
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from scipy import stats
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

from fedgraft.client.data.cache import Keeper
from fedgraft.client.data.rows import Columns, read_split
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.errors import DataError, JobError
from fedgraft.common.metrics.tally import Tally
from fedgraft.common.seeds import numpy_generator
from fedgraft.common.tasks.regression import STEP, NumberEvaluation, NumberMeasures

MEASURES = NumberMeasures(10.0, 135.0)
NUMBERS = st.lists(
    st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=40, unique_by=lambda x: x[0]
)


def evaluation(true: Any, predicted: Any) -> NumberEvaluation:
    """Of numbers that are scaled to 0..1."""
    true, predicted = (np.asarray(one, np.float64) for one in (true, predicted))
    return NumberEvaluation(float((4 * (true - predicted) ** 2).sum()), true, predicted, 125.0)


@given(NUMBERS, st.integers(1, 5))
def test_figures_of_summed_sites_are_those_of_the_pool(
    pairs: list[tuple[float, float]], sites: int
) -> None:
    true, predicted = np.array(pairs).T
    if true.std() < 0.05 or predicted.std() < 0.05:
        return  # a spread that rounding of sums would blur
    total = Tally.empty(MEASURES)
    for rows in np.array_split(np.arange(len(true)), sites):
        total += evaluation(true[rows], predicted[rows]).tally
    assert MEASURES.fits(total) and total.examples == len(true)
    found = MEASURES.figures(total)
    y, p = (10 + 125 * one for one in (true, predicted))
    assert found["mae"] == pytest.approx(mean_absolute_error(y, p), abs=125 * sites * STEP)
    assert found["mse"] == pytest.approx(mean_squared_error(y, p), abs=125**2 * sites * STEP)
    assert found["rmse"] == math.sqrt(found["mse"])
    slack = 20 * sites * STEP / true.var() + 20 * sites * STEP / predicted.var()
    assert found["r2"] == pytest.approx(r2_score(y, p), abs=slack * (1 + abs(r2_score(y, p))))
    assert found["pearson"] == pytest.approx(stats.pearsonr(y, p).statistic, abs=slack)


def test_what_has_no_spread_has_no_correlation() -> None:
    found = MEASURES.figures(evaluation([0.5, 0.5], [0.5, 0.5]).tally)
    assert (found["mae"], found["r2"], found["pearson"]) == (0, 0, 0)
    assert MEASURES.figures(Tally.empty(MEASURES))["loss"] == 0


def test_large_sums_keep_their_low_part() -> None:
    tally = evaluation(np.full(100_000, 0.7), np.full(100_000, 0.25)).tally
    assert MEASURES.figures(tally)["mae"] == pytest.approx(125 * 0.45, rel=1e-9)
    assert (tally.more < 1 << 24).all()  # what 128 sites may each put into a masked sum


@pytest.mark.parametrize("at", range(14))
def test_sums_that_no_numbers_have_do_not_fit(at: int) -> None:
    tally = evaluation([0.2, 0.8], [0.1, 0.9]).tally
    for wrong in (-1, 1 << 20):
        forged = tally.more.copy()
        forged[at] = wrong
        assert not MEASURES.fits(Tally(tally.loss, tally.confusion, forged))


def test_a_verdict_is_in_the_unit_of_the_target() -> None:
    draw = np.random.default_rng(0)
    true = draw.random(60)
    ours, theirs = evaluation(true, true + 0.01), evaluation(true, true + 0.05)
    judged = ours.compare(theirs, numpy_generator(0, "v"), name="ash", rival="local_only")
    assert judged["outcome"] == "helped"
    assert judged["difference"] == pytest.approx(-125 * 0.04)
    assert "1.25 instead of 6.25" in judged["sentence"]
    back = theirs.compare(ours, numpy_generator(0, "v"), name="ash", rival="zero_shot")
    assert back["outcome"] == "hurt" and back["interval"][0] > 0
    assert back["sentence"].startswith(
        "At ash the federated model is worse than the backbone untouched: mean absolute error 6.25 "
        "instead of 1.25 ("
    )
    assert back["sentence"].endswith(", 60 examples). This is negative transfer.")
    few = [evaluation([0.5], [0.5 + off]) for off in (0.1, 0.2)]
    one = few[0].compare(few[1], numpy_generator(0, "v"), name="ash", rival="local_only")
    assert ", 1 example, p = 1.00)" in one["sentence"]
    same = ours.compare(ours, numpy_generator(0, "v"), name="ash", rival="local_only")
    assert same["outcome"] == "unclear"
    kept = MEASURES.evaluation(json.loads(json.dumps(ours.to_json())))
    assert np.array_equal(kept.true, ours.true) and kept.span == 125.0
    both = ours.joined([theirs])
    assert np.array_equal(both.tally.confusion, [[120]]) and set(
        both.intervals(numpy_generator(0, "i"))
    ) == {"mae_interval", "r2_interval"}


def job(**data: Any) -> Job:
    raw = {
        "job": {"name": "t", "task": "text-regression"},
        "backbone": {"source": "path:nowhere"},
        "method": {"kind": "head"},
        "data": data,
    }
    return parse_job(raw, where="t")


def test_targets_are_read_and_scaled_to_the_range(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,target\na,0\nb,62.5\nc,125\n")
    made = job(lowest=0, highest=125)
    rows = read_split(str(path), made).dataset
    assert rows[:]["target"] == [0.0, 62.5, 125.0]

    class Letters:
        """One token a text."""

        limit, pad_id, pad_left, identity = None, 0, False, "letters"

        def tokenize(self, texts: Any, most: int) -> dict[str, Any]:
            return {"input_ids": [[ord(text[0])] for text in texts]}

    found = made.task.encode(Columns(rows), Letters(), made.settings, Keeper(None, ""))
    assert found.targets(np.arange(3)).tolist() == [-1.0, 0.0, 1.0]
    narrow = job(lowest=0, highest=100)
    with pytest.raises(DataError, match=r"rows\.csv, line 4: the target is outside of 0 to 100"):
        read_split(str(path), narrow)
    with pytest.raises(DataError, match="the target is outside of 0 to 100"):
        narrow.task.encode(Columns(rows), Letters(), narrow.settings, Keeper(None, ""))


@pytest.mark.parametrize("value", ['"7"', "true", "null", "[1]", "NaN", '""', "9" * 401])
def test_a_target_that_is_no_number_is_refused(value: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "a", "target": 1}}\n{{"text": "b", "target": {value}}}\n')
    with pytest.raises(DataError, match=r"line 2: (no number as|the) target") as caught:
        read_split(str(path), job())
    assert caught.value.hint


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({"lowest": 3, "highest": 3}, "not below"),
        ({"lowest": "low"}, "a finite number is wanted"),
        ({"lowest": -math.inf}, "a finite number is wanted"),
        ({"highest": math.nan}, "a finite number is wanted"),
        ({"highest": 10**400}, "a finite number is wanted"),
        ({"lowest": -1e308, "highest": 1e308}, "further apart"),
        ({"lowest": 0, "highest": 1e200}, "further apart"),
        ({"low": 3}, r"unknown key data\.low"),
    ],
)
def test_a_range_is_one(data: dict[str, Any], why: str) -> None:
    with pytest.raises(JobError, match=why):
        job(**data)


@pytest.mark.parametrize("cell", ["1_5", "3,5", "5%", "1e", "٣", "0x1", "1 5"])
def test_a_text_is_a_number_as_people_write_one(cell: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f'text,target\na, 0.5 \nb,"{cell}"\n')
    with pytest.raises(DataError, match="line 3: the target is no number") as caught:
        read_split(str(path), job())
    assert "decimal point" in caught.value.hint and cell not in str(caught.value)


def test_decimals_of_a_database_are_numbers_and_other_types_are_named(tmp_path: Path) -> None:
    def table(*values: Any) -> str:
        parquet.write_table(
            pa.table({"text": ["a"], "target": list(values)}), tmp_path / "t.parquet"
        )
        return str(tmp_path / "t.parquet")

    assert read_split(table(Decimal("0.25")), job()).dataset[:]["target"] == [0.25]
    with pytest.raises(DataError, match="of the type timedelta"):
        read_split(table(timedelta(1)), job())
