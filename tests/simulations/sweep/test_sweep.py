"""The grid of a sweep, what its cells come to together, and how that is shown."""

import string
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.federations import SMALL, digits_job

from fedgraft.common.errors import InputError
from fedgraft.common.tasks import TASKS
from fedgraft.simulations.baselines.over_seeds import spread
from fedgraft.simulations.cli import simulate as cli
from fedgraft.simulations.sweep import page as sweep_page
from fedgraft.simulations.sweep.grid import (
    Axis,
    as_number,
    make_cells,
    read_axes,
    short_names,
    split_values,
)
from fedgraft.simulations.sweep.results import (
    METRICS,
    CellResult,
    Results,
    gather,
    write_results,
)

# --- values

PLAIN = st.text(string.ascii_letters + string.digits + " ._-+:/=é", min_size=1).filter(str.strip)
BASIC = st.text(string.printable, max_size=8).map(
    lambda text: '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
)
LITERAL = st.text(string.printable.replace("'", ""), max_size=8).map(lambda text: f"'{text}'")
VALUES = st.recursive(
    PLAIN | BASIC | LITERAL,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]")
        | st.lists(inner, max_size=3).map(
            lambda items: "{" + ", ".join(f"k = {item}" for item in items) + "}"
        )
    ),
    max_leaves=6,
)


@given(st.lists(VALUES, min_size=1, max_size=5))
def test_joined_values_split_into_themselves(values: list[str]) -> None:
    assert split_values(",".join(values)) == tuple(value.strip() for value in values)


def test_commas_inside_a_value_do_not_split_it() -> None:
    assert split_values('["query","value"]') == ('["query","value"]',)
    assert split_values('["query"],["query","value"]') == ('["query"]', '["query","value"]')
    assert split_values("{shape='cosine', floor=0.1}, {floor=0}") == (
        "{shape='cosine', floor=0.1}",
        "{floor=0}",
    )
    assert split_values(r'"a\",b",c') == (r'"a\",b"', "c")
    assert split_values(r"'a\',b") == (r"'a\'", "b")  # a literal string knows no escape


@pytest.mark.parametrize(
    "text", ["", "1,", ",1", "1,,2", " , ", "[1,2", "1]", '"a', "{a=[1}", "]["]
)
def test_values_that_cannot_be_meant_are_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        split_values(text)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "number"),
    [("3", 3), ("1e-3", 0.001), ("-0.5", -0.5), ("true", None), ("ffa", None), ("inf", None),
     ("nan", None), ("[1]", None), ("30m", None)],
)  # fmt: skip
def test_numbers_are_told_from_names(text: str, number: float | None) -> None:
    assert as_number(text) == number


def test_keys_are_shortened_as_far_as_they_stay_apart() -> None:
    keys = ["training.learning_rate", "simulation.central.learning_rate", "aggregation.rule"]
    assert list(short_names(keys).values()) == [
        "training.learning_rate", "central.learning_rate", "rule",
    ]  # fmt: skip
    assert short_names(["a.b", "x.a.b"]) == {"a.b": "a.b", "x.a.b": "x.a.b"}


# --- cells

RATES = "training.learning_rate=1e-3,3e-3"


def cells_of(*items: str, seeds: int | None = None) -> Any:
    return make_cells(cli.DEMO, read_axes((*SMALL, *items)), seeds)


def test_every_combination_meets_every_seed_and_seeds_vary_slowest() -> None:
    cells = cells_of(RATES, "aggregation.rule=fedavg,ffa", seeds=2)
    assert [cell.number for cell in cells] == list(range(1, 9))
    assert [cell.label for cell in cells][:5] == [
        "learning_rate=1e-3 rule=fedavg seed=0",
        "learning_rate=1e-3 rule=ffa seed=0",
        "learning_rate=3e-3 rule=fedavg seed=0",
        "learning_rate=3e-3 rule=ffa seed=0",
        "learning_rate=1e-3 rule=fedavg seed=1",
    ]
    jobs = [(c.job.training.learning_rate, c.job.aggregation.rule, c.job.job.seed) for c in cells]
    assert len(set(jobs)) == 8
    assert (0.003, "ffa", 1) in jobs
    assert all(cell.job.rounds.count == 3 for cell in cells)


def test_seeds_count_up_from_the_jobs_own_or_are_named() -> None:
    (first,) = cells_of()
    assert first.seed == digits_job().job.seed == 0
    assert first.label == "seed=0"
    assert [cell.seed for cell in cells_of("job.seed=7,3")] == [7, 3]
    assert cells_of("job.seed=7,3")[0].settings == {}


def test_values_go_the_way_of_an_override() -> None:
    cells = cells_of('method.targets="all-linear",["query"],["query", "value"]')
    assert [cell.job.method.targets for cell in cells] == [
        "all-linear", ("query",), ("query", "value"),
    ]  # fmt: skip


def test_comparisons_are_left_out_unless_asked_for() -> None:
    asked = ('simulation.baselines=["central"]', "simulation.finetune_epochs=1")
    for items, expected in (((), ((), 0)), (asked, (("central",), 1))):
        (settings,) = [c.job.simulation for c in make_cells(cli.DEMO, read_axes(items), None)]
        assert settings is not None
        assert (settings.baselines, settings.finetune_epochs) == expected


@pytest.mark.parametrize(
    ("items", "seeds", "what"),
    [
        (("rounds",), None, "'rounds' is not section.key=V1,V2"),
        (("rounds.count=",), None, "--set rounds.count: '' has an empty value"),
        (("training.epochs=1,2", "training.epochs =3"), None, "training.epochs is given twice"),
        (("training.learning_rate=1e-3,0.001",), None, "cells 1 and 2 are the same job"),
        (("job.seed=1,1",), None, "cells 1 and 2 are the same job: seed=1 and seed=1"),
        (("job.seed=1",), 2, "both job.seed and --seeds are given"),
        ((), 0, "--seeds 0 is no number of seeds"),
        ((RATES,), 501, "1,002 cells, more than 1,000"),
        (("rounds.count=",), 0, "empty value"),
        (("training.lerning_rate=1,2",), None, "cell lerning_rate=1: "),
        ((RATES, "rounds.min_sites=1,9"), 2, "cell learning_rate=1e-3 min_sites=9 seed=0: "),
        (("job.seed=1,x",), None, "cell seed=x: "),
    ],
)  # fmt: skip
def test_a_grid_that_cannot_be_meant_is_refused(
    items: tuple[str, ...], seeds: int | None, what: str
) -> None:
    with pytest.raises(InputError) as caught:
        make_cells(cli.DEMO, read_axes(("simulation.sites=3", *items)), seeds)
    assert what in str(caught.value)
    assert caught.value.hint


def test_an_illegal_pair_is_refused_by_the_name_of_its_cell(tmp_path: Path) -> None:
    text = cli.DEMO.read_text()
    method = text[text.index("[method]") : text.index("[training]")]
    (tmp_path / "job.toml").write_text(text.replace(method, "[method]\nkind = 'head'\n"))
    with pytest.raises(InputError, match=r'^cell rule=ffa seed=0: .*rule "ffa"') as caught:
        make_cells(tmp_path / "job.toml", read_axes(("aggregation.rule=fedavg,ffa",)), None)
    assert 'aggregation.rule = "fedavg"' in caught.value.hint


def test_a_missing_job_file_is_not_the_fault_of_a_cell(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^no file"):
        make_cells(tmp_path / "none.toml", read_axes((RATES,)), None)


# --- what cells come to together


def test_the_interval_is_students() -> None:
    assert spread([0.5]).half is None
    found = spread([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.302653 / 3**0.5)  # t(0.975, 2) and a deviation of 1
    assert found.text(scale=10, digits=2) == "20.00 ± 24.84"


Make = Callable[..., Results]


def cell(number: int, settings: dict[str, str], seed: int, **metrics: float | None) -> CellResult:
    label = " ".join([*(f"{key}={value}" for key, value in settings.items()), f"seed={seed}"])
    return CellResult(
        number, label, settings, seed, "finished", f"run-{number}", None,
        {metric: metrics.get(metric, 1.0) for metric in METRICS},
    )  # fmt: skip


ACCURACY = TASKS["text-classification"].metrics[0]
AXES = (Axis("training.rate", ("1", "3")), Axis("rounds.count", ("3",)))


def two_rows(
    folder: Path, *, validation: tuple[float | None, ...] = (0.7, 0.9, 0.7, 0.5)
) -> Results:
    """Row 0 is better on validation, row 1 on the test set."""
    test = (0.5, 0.6, 0.9, 0.8)
    cells = [
        cell(at + 1, {"training.rate": ("1", "3")[at // 2]}, at % 2,
             validation=validation[at], test=test[at])
        for at in range(4)
    ]  # fmt: skip
    return gather(folder, "job", AXES, cells, ACCURACY)


def test_the_best_is_chosen_on_validation_where_there_is_one(tmp_path: Path) -> None:
    results = two_rows(tmp_path)
    assert (results.chosen_by, results.best) == ("validation", 0)
    said = " ".join([sweep_page.headline(results), *sweep_page.footnotes(results)])
    assert "Best by federated validation accuracy: rate=1, 80.0 ± 127.1 %" in said
    assert "the next, rate=3, is 20.0 ± 254.1 points behind, which 2 seeds cannot tell" in said
    assert "The best of many cells by the test column would look better" in said
    assert "picked on the test set" not in said


@pytest.mark.parametrize("task", ["causal-lm", "text-regression", "masked-image-modeling"])
def test_where_less_is_better_the_best_has_the_least(task: str, tmp_path: Path) -> None:
    """Token accuracy can be larger where perplexity, which is reported, is far worse."""
    metric = TASKS[task].metrics[0]
    assert not metric.higher
    cells = [cell(at + 1, {"training.rate": ("1", "3")[at]}, 0, validation=value, test=value)
             for at, value in enumerate((8.17, 13.4))]  # fmt: skip
    results = gather(tmp_path, "job", AXES, cells, metric)
    assert results.best == 0 and results.to_json()["metric"] == metric.key
    said = sweep_page.headline(results)
    assert said.startswith(f"Best by federated validation {metric.name}: rate=1, 8.17; the next,")
    assert "rate=3, is 5.23 behind" in said and "%" not in said
    columns, (first, second) = sweep_page.table(results)
    assert first[1:3] == ["8.17", "8.17"] and second[1] == metric.text(13.4)
    assert metric.name in columns[1] or metric.short in columns[1]
    sweep_page.write_page(results)
    assert "8.17" in (tmp_path / "sweep.html").read_text()


@pytest.mark.parametrize("task", ["causal-lm", "masked-image-modeling", "image-classification"])
@pytest.mark.parametrize("key", ["backbone.source", "backbone.quantize"])
def test_means_over_tokens_of_two_backbones_do_not_compare(
    key: str, task: str, tmp_path: Path
) -> None:
    metric = TASKS[task].metrics[0]
    cells = [cell(at + 1, {key: ("a", "b")[at]}, 0, validation=value, test=value)
             for at, value in enumerate((8.17, 13.4))]  # fmt: skip
    results = gather(tmp_path, "job", AXES, cells, metric)
    apart = key == "backbone.source" and task != "image-classification"
    assert (results.best is None) == apart
    assert ("do not compare" in sweep_page.headline(results)) == apart


def test_without_validation_the_best_is_of_the_test_set_and_says_so(tmp_path: Path) -> None:
    results = two_rows(tmp_path, validation=(0.7, 0.9, 0.7, None))
    assert (results.chosen_by, results.best) == ("test", 1)
    assert any("the best of 2 there is optimistic" in n for n in sweep_page.footnotes(results))


def test_a_row_with_a_failed_seed_is_not_the_best(tmp_path: Path) -> None:
    good = two_rows(tmp_path)
    broken = replace(
        good.cells[0], status="failed", error="too | few\nsites", metrics=dict.fromkeys(METRICS)
    )
    results = gather(tmp_path, "job", AXES, (broken, *good.cells[1:]), ACCURACY)
    assert results.best == 1
    columns, (first, second) = sweep_page.table(results)
    assert first[0] == "1" and first[-1] == "1 of 2 failed" and second[-1] == "best"
    assert first[columns.index("test %")] == "60.0"  # of the one seed that finished
    sweep_page.write_table(results)
    text = (tmp_path / "table.md").read_text()
    assert "- failed: training.rate=1 seed=0: too \\| few sites" in text
    (head, *lines) = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {head.count("|")}


def test_nothing_is_best_of_one_or_of_none(tmp_path: Path) -> None:
    one = gather(tmp_path, "job", (), [cell(1, {}, 0)], ACCURACY)
    assert one.best is None and one.rows[0].label == "job"
    lost = replace(cell(1, {}, 0), status="failed", metrics=dict.fromkeys(METRICS))
    none = gather(tmp_path, "job", (), [lost], ACCURACY)
    assert none.chosen_by is None
    sweep_page.write_page(none)
    assert not (tmp_path / "sweep.png").exists()
    assert "<img" not in (tmp_path / "sweep.html").read_text()


def test_columns_without_any_value_are_left_out(tmp_path: Path) -> None:
    results = two_rows(tmp_path, validation=(None, None, None, None))
    columns, _ = sweep_page.table(results)
    assert columns[:3] == ["rate", "test %", "macro F1 %"]


def test_the_json_has_rows_cells_and_the_grid(tmp_path: Path) -> None:
    results = two_rows(tmp_path)
    value = results.to_json()
    assert value["swept"] == {"training.rate": ["1", "3"]}
    assert value["fixed"] == {"rounds.count": "3"}
    assert value["seeds"] == [0, 1] and value["best"] == 0
    assert value["rows"][1]["cells"] == [3, 4]
    assert value["rows"][1]["test"]["mean"] == pytest.approx(0.85)
    assert value["cells"][2]["metrics"]["test"] == 0.9
    write_results(results)
    assert (tmp_path / "results.json").read_text().startswith("{")


def test_the_page_shows_values_as_text(tmp_path: Path) -> None:
    cells = [cell(at, {"a.b": value}, 0) for at, value in enumerate(("<b>x</b>", "y"), 1)]
    results = gather(tmp_path, "job", (Axis("a.b", ("<b>x</b>", "y")),), cells, ACCURACY)
    sweep_page.write_page(results)
    page = (tmp_path / "sweep.html").read_text()
    assert ">&lt;b&gt;x&lt;/b&gt;<" in page and "<b>x" not in page
    assert 'src="data:image/png;base64,' in page and 'href="runs/run-1/report.html"' in page
