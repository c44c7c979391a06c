"""What every task must do, tried on a federation that follows from its contract alone.

A task that is new in ``TASKS`` is tried here without a line of its own. What it computes, and
whether it is right, its own tests say.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import transformers
from support.contract import (
    Federation,
    card_model,
    check_figures,
    check_resumed,
    distance,
    outputs,
    same,
)
from support.contract_rows import FORMS, forms_of, raw_row, rows_of, sort_rows, write_lines
from support.contract_tasks import TaskCase

from fedgraft.client.data.rows import read_split
from fedgraft.common.errors import DataError

WRONG = (None, {"no": "value"}, 3.5, "no such value", [["nested"]])
"""Values for the column beside. Every task must refuse at least four of them."""


# Rows


def test_rows_come_back_from_every_file_that_a_site_may_have(
    case: TaskCase, tmp_path: Path
) -> None:
    rows = case.rows["ash"]["train"]
    for form in forms_of(case.job, rows[0]):
        path = FORMS[form](case.job, rows, tmp_path / form)
        read = read_split(str(path), case.job)
        assert read.skipped == 0
        assert sort_rows(rows_of(read.dataset, case.task)) == sort_rows(rows), form


def test_a_partition_writes_what_a_site_reads(case: TaskCase) -> None:
    folder = case.federation.prepared.folder
    assert {site.name for site in case.federation.prepared.sites} == set(case.rows)
    for site, splits in case.rows.items():
        for split, rows in splits.items():
            read = read_split(str(folder / site / f"{split}.parquet"), case.job)
            assert rows_of(read.dataset, case.task) == rows, (site, split)


def lines_of(case: TaskCase, folder: Path) -> list[dict[str, Any]]:
    """Two rows as a site's table has them, files beside it."""
    rows = case.rows["ash"]["train"][:2]
    FORMS["jsonl"](case.job, rows, folder)
    name = case.job.data.column(case.task.content)
    cells = [{name: row[case.task.content], **raw_row(case.job, row)} for row in rows]
    for number, cell in enumerate(cells if case.task.modality.files else ()):
        cell[name] = next(folder.glob(f"{number:03d}.*")).name
    return cells


def refused(case: TaskCase, path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        read_split(str(path), case.job)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("empty", [None, "", "absent"])
def test_empty_content_is_refused_with_its_line(
    case: TaskCase, empty: str | None, tmp_path: Path
) -> None:
    good, bad = lines_of(case, tmp_path)
    name = case.job.data.column(case.task.content)
    bad = {key: value for key, value in bad.items() if key != name}
    bad |= {} if empty == "absent" else {name: empty}
    path = write_lines(tmp_path / "bad.jsonl", [good, bad])
    assert f"{path}, line 2" in str(refused(case, path))


def test_a_missing_column_is_refused_by_its_name(case: TaskCase, tmp_path: Path) -> None:
    cells = lines_of(case, tmp_path)
    for column in cells[0]:
        others = [{"else": 1, **{k: v for k, v in one.items() if k != column}} for one in cells]
        path = write_lines(tmp_path / "bad.jsonl", others)
        told = str(refused(case, path))
        assert str(path) in told and repr(column) in told


def test_what_stands_beside_is_refused_where_it_is_of_a_wrong_type(
    case: TaskCase, tmp_path: Path
) -> None:
    if case.task.beside is None:
        return
    good, bad = lines_of(case, tmp_path)
    column, read = case.job.data.column(case.task.beside), 0
    for number, value in enumerate(WRONG):
        path = write_lines(tmp_path / f"{number}.jsonl", [good, {**bad, column: value}])
        try:
            read_split(str(path), case.job)
            read += 1
        except DataError as error:
            assert f"{path}, line 2" in str(error) and error.hint, value
    assert read <= 1, "a text or a number, but not both"
    path = write_lines(tmp_path / "bad.jsonl", [good, {**bad, column: None}])
    assert f"{path}, line 2" in str(refused(case, path))


# Rounds


def test_two_rounds_move_the_adapter_and_every_figure_is_a_number(federation: Federation) -> None:
    run, task = federation.simulated, federation.job.task
    start = federation.bench.initial_of(federation.exchanged)
    assert distance(federation.adapter, start) > 1e-3
    assert [line["round"] for line in run.history()] == [1, 2]
    summary = run.summary()
    assert summary is not None
    for line in run.history():
        assert line["sites"] == 2 and not line["dropped"]
        assert math.isfinite(line["train_loss"]) and line["train_loss"] > 0
        check_figures(task.metrics, line["validation"])
    for model in ("federated", "zero_shot"):
        check_figures(task.metrics, summary["final"][model])
    for site in summary["sites"]:
        check_figures(task.metrics, site["federated"])
        assert set(site["comparisons"]) == {"local_only", "zero_shot"} and site["verdict"]


def test_a_run_that_was_interrupted_ends_in_the_same_bytes(federation: Federation) -> None:
    check_resumed(federation, federation.simulated, federation.adapter)


def test_sites_in_one_pass_come_to_what_they_come_to_one_by_one(federation: Federation) -> None:
    assert distance(federation.together, federation.adapter) < 1e-5


# What is given away


def test_peft_and_transformers_alone_load_the_export(case: TaskCase, tmp_path: Path) -> None:
    """Also with a backbone that has another head, where the adapter brings its own."""
    federation, inputs = case.federation, case.inputs
    folder = federation.simulated.folder / "adapter"
    bench = federation.bench
    untrained = outputs(bench.model, inputs)
    bench.put((federation.exchanged, federation.adapter))
    trained = outputs(bench.model, inputs)
    bench.put()
    assert not same(trained, untrained, 1e-3), "it did not train"
    for backbone in (case.backbone, other_head(case, tmp_path / "backbone")):
        assert same(outputs(card_model(folder, backbone), inputs), trained, 1e-5)


def other_head(case: TaskCase, folder: Path) -> Path:
    """The backbone as it came for seven labels, where it has labels at all."""
    auto = getattr(transformers, case.task.auto_class)
    model = auto.from_pretrained(case.backbone, num_labels=7, ignore_mismatched_sizes=True)
    model.save_pretrained(folder)
    return folder
