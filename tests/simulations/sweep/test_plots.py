"""The figure of a sweep says what the table says: looked at before it becomes pixels."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from matplotlib.figure import Figure

from fedgraft.common.metrics.metric import Metric
from fedgraft.common.tasks import TASKS
from fedgraft.simulations.sweep import plots as sweep_plots
from fedgraft.simulations.sweep.grid import Axis
from fedgraft.simulations.sweep.results import METRICS, CellResult, Results, gather

RATE = Axis("training.learning_rate", ("1e-4", "1e-3", "1e-2"))
RULE = Axis("aggregation.rule", ("fedavg", "ffa"))
RANK = Axis("method.rank", ("2", "8"))


ACCURACY, PERPLEXITY = (TASKS[n].metrics[0] for n in ("text-classification", "causal-lm"))


def swept(
    *axes: Axis,
    seeds: int = 2,
    failed: Sequence[int] = (),
    least: int = 30,
    metric: Metric = ACCURACY,
) -> Results:
    """Cell n has a share of n + ``least`` % on the test set, and 10 points more in validation."""
    cells: list[CellResult] = []
    for seed, values in itertools.product(
        range(seeds), itertools.product(*(a.values for a in axes))
    ):
        number = len(cells) + 1
        share = None if number in failed else (number + least) / 100
        metrics = dict.fromkeys(METRICS) | {
            "test": share, "validation": share and share + 0.1,
        }  # fmt: skip
        settings = dict(zip([axis.key for axis in axes], values, strict=True))
        status: Literal["finished", "failed"] = "finished" if share else "failed"
        cells.append(CellResult(number, "", settings, seed, status, None, None, metrics))
    return gather(Path(), "job", axes, cells, metric)


@pytest.fixture
def painted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Results], Figure]:
    """The figure that ``draw`` paints."""
    figure = Figure()

    def keep(paint: Callable[[Figure], None], size: tuple[float, float]) -> bytes:
        assert min(size) > 1
        paint(figure)
        return b""

    def paint(results: Results) -> Figure:
        sweep_plots.draw(results)
        return figure

    monkeypatch.setattr(sweep_plots, "_render", keep)
    return paint


def joined(figure: Figure, panel: int = 0) -> list[list[float]]:
    """The y values of the lines that join means."""
    lines = [line for line in figure.axes[panel].get_lines() if line.get_marker() == "None"]
    points = [(np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in lines]
    return [y.tolist() for x, y in points if len(np.unique(x)) > 1]


def test_one_number_is_a_line_through_the_means(painted: Callable[[Results], Figure]) -> None:
    figure = painted(swept(RATE))
    validation, test = figure.axes
    assert [axes.get_title(loc="left") for axes in (validation, test)] == [
        "Federated validation", "Pooled test set",
    ]  # fmt: skip
    assert joined(figure) == [pytest.approx([42.5, 43.5, 44.5])]
    assert joined(figure, 1) == [pytest.approx([32.5, 33.5, 34.5])]
    assert validation.get_xscale() == "log"
    assert [tick.get_text() for tick in validation.get_xticklabels()] == list(RATE.values)
    low, high = validation.get_ylim()  # of both panels, with their intervals
    assert low < 32.5 - 12.7 and high > 44.5 + 12.7
    assert validation.get_ylim() == test.get_ylim()
    assert not figure.legends


def test_names_are_dots_without_a_line(painted: Callable[[Results], Figure]) -> None:
    figure = painted(swept(RULE))
    assert joined(figure) == []
    assert figure.axes[0].get_xscale() == "linear"
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["fedavg", "ffa"]


def test_the_second_key_makes_a_series_and_a_failed_cell_a_gap(
    painted: Callable[[Results], Figure],
) -> None:
    figure = painted(swept(RATE, RULE, seeds=1, failed=(3,)))
    assert joined(figure, 1) == [pytest.approx([31, 35]), pytest.approx([32, 34, 36])]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["rule=fedavg", "rule=ffa"]


def test_three_keys_are_a_row_a_combination(painted: Callable[[Results], Figure]) -> None:
    figure = painted(swept(RATE, RULE, RANK))
    names = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert len(names) == 12 and names[1] == "learning_rate=1e-4 rule=fedavg rank=8"
    assert figure.axes[0].yaxis_inverted()
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()


def test_an_axis_of_accuracy_stays_within_0_and_100(painted: Callable[[Results], Figure]) -> None:
    far = Axis("a.b", tuple(f"v{at}" for at in range(30)))
    low, high = painted(swept(far)).axes[0].get_ylim()
    assert low >= -1.5 and high <= 101.5


@pytest.mark.parametrize("axes", [(RULE,), (RATE, RULE, RANK)], ids=["over a key", "rows"])
def test_a_share_below_0_is_on_the_axis(
    painted: Callable[[Results], Figure], axes: tuple[Axis, ...]
) -> None:
    """R2 of a poor model is below 0, in one panel or in both."""
    panel = painted(swept(*axes, least=-50)).axes[0]
    low, high = panel.get_ylim() if len(axes) < 3 else panel.get_xlim()
    assert low < -49 and high > -30


@pytest.mark.parametrize("axes", [(RATE,), (RATE, RULE, RANK)], ids=["over a key", "rows"])
def test_what_is_no_share_has_an_axis_of_its_own(
    painted: Callable[[Results], Figure], axes: tuple[Axis, ...]
) -> None:
    panel = painted(swept(*axes, least=900, metric=PERPLEXITY)).axes[0]
    over = len(axes) < 3
    low, high = panel.get_ylim() if over else panel.get_xlim()
    assert 8 < low < 9.02 < high < 11  # the values themselves, not in percent and not cut
    assert (panel.get_ylabel() if over else panel.get_xlabel()) == "perplexity"


def test_the_picture_is_a_png_whatever_values_are_called() -> None:
    odd = Axis("a.b", ('"$x_$"', '"\u4e2d\\n<&"', "'" + "long " * 40 + "'"))
    assert sweep_plots.draw(swept(odd)).startswith(b"\x89PNG")
    assert sweep_plots.draw(swept(odd)) == sweep_plots.draw(swept(odd))
