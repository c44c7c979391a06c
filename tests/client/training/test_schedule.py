"""The learning rate over a whole federation: warm-up, a peak, and the shape that follows."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.trainings import digits, noisy, open_small, settings, task

from fedgraft.client.training.trainer import Span, learning_rate, train
from fedgraft.common.config.training import Schedule

PEAK = 0.02


@pytest.mark.parametrize(
    ("schedule", "progress", "share"),
    [
        (Schedule(shape="constant"), 0.0, 1.0),
        (Schedule(shape="constant"), 0.99, 1.0),
        (Schedule(shape="linear"), 0.0, 1.0),
        (Schedule(shape="linear"), 0.25, 0.75),
        (Schedule(shape="linear"), 1.0, 0.0),
        (Schedule(shape="cosine"), 0.0, 1.0),
        (Schedule(shape="cosine"), 1 / 3, 0.75),
        (Schedule(shape="cosine"), 0.5, 0.5),
        (Schedule(shape="cosine"), 1.0, 0.0),
        (Schedule(shape="linear", floor=0.2), 0.5, 0.6),
        (Schedule(shape="linear", floor=0.2), 1.0, 0.2),
        (Schedule(shape="cosine", floor=0.1), 1.0, 0.1),
        (Schedule(shape="constant", warmup=0.2), 0.1, 0.5),
        (Schedule(shape="constant", warmup=0.2), 0.2, 1.0),
        (Schedule(shape="constant", warmup=0.2), 0.0, 0.01),  # a first step of zero is lost
        (Schedule(shape="linear", warmup=0.2), 0.2, 1.0),
        (Schedule(shape="linear", warmup=0.2), 0.6, 0.5),
        (Schedule(shape="linear", warmup=0.2), 1.0, 0.0),
    ],
)
def test_the_rate_follows_the_schedule(schedule: Schedule, progress: float, share: float) -> None:
    assert learning_rate(PEAK, schedule, progress) == pytest.approx(PEAK * share, abs=1e-15)


def rates_of(over: str, span: Span) -> list[float]:
    """The rates that a pass of three steps uses."""
    stack, rows = open_small("deep-vit"), digits(24)
    wanted = settings(batch_size=8, learning_rate=PEAK, schedule={"shape": "linear", "over": over})
    seen: list[float] = []
    pass_ = torch.optim.AdamW.step

    def step(optimizer: torch.optim.AdamW, *args: Any) -> Any:
        seen.append(optimizer.param_groups[0]["lr"])
        return pass_(optimizer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        train(
            stack, stack.bench.layout, [task(rows, noisy(stack.bench))], settings=wanted, span=span
        )
    return seen


def test_it_may_start_anew_in_each_round() -> None:
    second = Span(0.5, 1.0)  # of two rounds
    assert rates_of("federation", second) == pytest.approx([PEAK / 2, PEAK / 3, PEAK / 6])
    assert rates_of("round", second) == pytest.approx([PEAK, PEAK * 2 / 3, PEAK / 3])


schedules = st.builds(
    Schedule,
    shape=st.sampled_from(["cosine", "linear", "constant"]),
    warmup=st.floats(0, 0.99),
    floor=st.floats(0, 1),
)


@given(schedules, st.floats(0, 1), st.floats(0, 1))
def test_the_rate_rises_to_the_peak_and_then_falls_to_the_floor(
    schedule: Schedule, one: float, other: float
) -> None:
    early, late = sorted((one, other))
    first, second = (learning_rate(PEAK, schedule, at) for at in (early, late))
    slack = 1e-12 * PEAK
    assert 0 <= first <= PEAK + slack and 0 <= second <= PEAK + slack
    if late < schedule.warmup:
        assert first <= second + slack
    if early >= schedule.warmup:
        assert second <= first + slack
        assert second >= schedule.floor * PEAK - slack
