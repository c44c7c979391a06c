"""Groups: read from a site's own column, counted apart, never guessed."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from support.evaluations import measured_labels
from support.trainings import digits, noisy, open_small

from fedgraft.client.data.rows import read_split
from fedgraft.common.config.job import Job
from fedgraft.common.errors import DataError
from fedgraft.common.examples import concatenate
from fedgraft.common.metrics.measures import LabelMeasures

ROWS = [("a", "yes", "f"), ("b", "no", ""), ("c", "yes", "m"), ("d", "no", "m")]


def job(**data: Any) -> Job:
    return Job.model_validate(
        {
            "job": {"name": "j", "task": "text-classification", "labels": ["yes", "no"]},
            "backbone": {"source": "builtin:tiny-vit"},
            "method": {"kind": "head"},
            "data": {"group": "sex", "groups": ["m", "f"], **data},
        }
    )


def table(folder: Path, name: str, header: tuple[str, ...] = ("text", "label", "sex")) -> str:
    path = folder / name
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([header, *ROWS])
    else:
        lines = [json.dumps(dict(zip(header, row, strict=True))) for row in ROWS]
        path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_a_row_has_the_group_its_column_says_or_none(tmp_path: Path, name: str) -> None:
    found = read_split(table(tmp_path, name), job()).dataset
    assert list(found["group"]) == [1, -1, 0, 0]
    assert list(found["text"]) == ["a", "b", "c", "d"]
    assert "group" not in read_split(table(tmp_path, name), job(group=None, groups=())).dataset[0]


def test_a_site_may_call_the_column_otherwise(tmp_path: Path) -> None:
    path = table(tmp_path, "rows.csv", ("text", "label", "Geschlecht"))
    found = read_split(path, job(), columns={"sex": "Geschlecht"}).dataset
    assert list(found["group"]) == [1, -1, 0, 0]
    with pytest.raises(DataError, match="no column 'sex'"):
        read_split(path, job())


def test_a_site_without_labels_has_groups(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,sex\na,f\nb,\n")
    found = read_split(str(path), job(), labelled=False).dataset
    assert list(found["group"]) == [1, -1]


def test_numbers_of_pandas_and_letters_in_two_parts_are_the_groups_they_mean(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.parquet"
    columns = {"text": ["a", "b", "c"], "label": ["yes"] * 3, "sex": [1.0, 2.0, None]}
    parquet.write_table(pa.table(columns), path)
    found = read_split(str(path), job(groups=["1", "2"])).dataset
    assert list(found["group"]) == [0, 1, -1]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a", "label": "yes", "sex": "cafe\u0301"}))
    assert list(read_split(str(path), job(groups=["x", "caf\u00e9"])).dataset["group"]) == [1]


def test_a_group_that_the_job_does_not_list_is_refused_without_repeating_it(
    tmp_path: Path,
) -> None:
    with pytest.raises(DataError, match="line 4: its group is not one of") as refused:
        read_split(table(tmp_path, "rows.csv"), job(groups=["f", "x"]))
    assert "'m'" not in str(refused.value)


def test_a_folder_of_images_has_no_groups(tmp_path: Path) -> None:
    from fedgraft.client.data.groups import read_groups

    (tmp_path / "yes").mkdir()
    with pytest.raises(DataError, match="is no table"):
        read_groups(str(tmp_path), job().data, {})


def test_groups_follow_their_examples_and_are_counted_with_the_model_s_own_answers() -> None:
    stack, examples = open_small("vit"), digits(60)
    groups = np.arange(60) % 3 - 1
    some = np.random.default_rng(2).permutation(60)[:40]
    from dataclasses import replace

    chosen = replace(examples, groups=groups).subset(some)
    assert chosen.groups is not None and np.array_equal(chosen.groups, groups[some])
    measures = LabelMeasures(10, 0, ("f", "m"))
    found = measured_labels(stack, stack.bench.layout, noisy(stack.bench), chosen, measures)
    rows = found.more.reshape(2, 2)
    for number in (0, 1):
        mine = found.correct[groups[some] == number]
        assert rows[number].tolist() == [mine.sum(), len(mine) - mine.sum()]
    assert concatenate([chosen, chosen]).groups is None


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_scores_are_counted_whatever_the_batches(kind: str) -> None:
    from support.trainings import rows_for

    stack, examples = open_small(kind), rows_for(kind, 150)
    measures = LabelMeasures(10, 20)
    vector = noisy(stack.bench)
    found = measured_labels(stack, stack.bench.layout, vector, examples, measures)
    assert measures.fits(found.tally)
    plain = measured_labels(stack, stack.bench.layout, vector, examples, LabelMeasures(10))
    assert plain.loss == found.loss and np.array_equal(plain.predicted, found.predicted)
    assert len(plain.more) == 0
