"""A reply that is not exactly what was asked for is refused with its reason, and nothing else."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgraft.common.config.sections import Aggregation
from fedgraft.common.errors import MessageError
from fedgraft.common.layout import Layout
from fedgraft.common.messages.payloads import EvaluateReply, TrainReply
from fedgraft.common.metrics.measures import LabelMeasures
from fedgraft.common.metrics.part_evaluation import TOKENS, PartMeasures
from fedgraft.common.metrics.tally import Tally
from fedgraft.server.protocol.validation import (
    Expected,
    InvalidReply,
    check_evaluation,
    check_update,
)

LAYOUT = Layout(("w",), ((4,),))
EXPECTED = Expected("session", 3, LAYOUT)
MEASURES = LabelMeasures(2)
LIMITS = Aggregation(max_update_norm=5.0, max_examples=100)
# Its norm is the limit exactly.
GOOD = TrainReply(
    "session", 3, LAYOUT.fingerprint, 10, 0.5, np.array([3, 0, 4, 0], dtype=np.float32)
)


def refused(**changes: Any) -> str:
    """The reason why a good reply with these changes is refused; empty if it is accepted."""
    try:
        check_update(replace(GOOD, **changes), EXPECTED, LIMITS, MEASURES)
    except InvalidReply as error:
        return str(error)
    return ""


def vector(*values: float, dtype: Any = np.float32) -> Any:
    return np.array(values, dtype)


def test_a_good_update_at_the_norm_limit_is_accepted() -> None:
    assert refused() == ""


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"session": "another"}, "wrong-session"),
        ({"round": 2}, "wrong-round"),
        ({"round": 4}, "wrong-round"),
        ({"layout": Layout(("v",), ((4,),)).fingerprint}, "wrong-layout"),
        ({"update": vector(3, 0, 4, 0, dtype=np.float64)}, "wrong-dtype"),
        ({"update": vector(3, 0, 4, 0, dtype=np.float16)}, "wrong-dtype"),
        ({"update": vector(3, 0, 4, 0, dtype=np.int32)}, "wrong-dtype"),
        ({"update": vector(3, 0, 4, 0, dtype=">f4")}, "wrong-dtype"),
        ({"update": vector(3, 0, 4, 0, dtype="U3")}, "wrong-dtype"),
        ({"update": vector(3, 0, 4)}, "wrong-shape"),
        ({"update": vector(3, 0, 4, 0, 0)}, "wrong-shape"),
        ({"update": vector()}, "wrong-shape"),
        ({"update": np.float32(1) + np.zeros((), np.float32)[...]}, "wrong-shape"),
        ({"update": np.zeros((2, 2), np.float32)}, "wrong-shape"),
        ({"update": np.zeros((4, 1), np.float32)}, "wrong-shape"),
        ({"examples": 0}, "bad-count"),
        ({"examples": -9}, "bad-count"),
        ({"examples": 101}, "bad-count"),
        ({"examples": 2**80}, "bad-count"),
        ({"loss": float("nan")}, "bad-loss"),
        ({"loss": float("inf")}, "bad-loss"),
        ({"loss": float("-inf")}, "bad-loss"),
        ({"update": np.nextafter(GOOD.update, np.float32(np.inf))}, "norm-too-large"),
        # Finite in float32, but not their squares.
        ({"update": np.full(4, 3e38, np.float32)}, "norm-too-large"),
    ],
)
def test_each_reason_has_its_code(changes: dict[str, Any], code: str) -> None:
    assert refused(**changes) == code


@pytest.mark.parametrize("count", [1, 100])
def test_counts_at_the_limits_are_accepted(count: int) -> None:
    assert refused(examples=count) == ""


def test_an_example_with_many_tokens_counts_for_as_many() -> None:
    blocks = PartMeasures(32, TOKENS)
    for count, code in ((3200, ""), (3201, "bad-count")):
        reply = replace(GOOD, examples=count)
        with nullcontext() if not code else pytest.raises(InvalidReply, match=code):
            check_update(reply, EXPECTED, LIMITS, blocks)


def test_large_finite_updates_pass_where_the_job_allows_them() -> None:
    reply = replace(GOOD, update=np.full(4, 3e38, np.float32))
    check_update(reply, EXPECTED, Aggregation(max_update_norm=1e39), MEASURES)


@given(st.integers(0, 3), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_one_number_that_is_none_spoils_an_update(place: int, value: float) -> None:
    update = GOOD.update.copy()
    update[place] = value
    assert refused(update=update) == "not-finite"


def test_infinities_that_cancel_are_not_finite() -> None:
    assert refused(update=vector(np.inf, -np.inf, 0, 0)) == "not-finite"


@pytest.mark.parametrize("loss", [-1.0, 1e308])
def test_a_loss_that_no_cross_entropy_has_is_refused(loss: float) -> None:
    # Summed over a hundred thousand claimed examples it would make the round's record infinite.
    assert refused(loss=loss) == "bad-loss"


# Evaluation

TALLY = Tally(2.5, np.array([[3, 1], [0, 4]]))


def evaluated(tally: Any, *, session: str = "session", number: int = 3) -> Tally:
    return check_evaluation(EvaluateReply(session, number, tally), EXPECTED, LIMITS, MEASURES)


def test_a_good_tally_is_read_back() -> None:
    tally = evaluated(TALLY.to_vector())
    assert tally.loss == 2.5
    assert tally.confusion.tolist() == [[3, 1], [0, 4]]


def test_a_tally_of_no_examples_is_accepted() -> None:
    assert evaluated(Tally.empty(LabelMeasures(2)).to_vector()).examples == 0


@pytest.mark.parametrize(
    ("origin", "code"),
    [({"session": "x"}, "wrong-session"), ({"number": 2}, "wrong-round")],
)
def test_a_tally_of_another_time_is_refused(origin: dict[str, Any], code: str) -> None:
    with pytest.raises(InvalidReply, match=code):
        evaluated(TALLY.to_vector(), **origin)


@pytest.mark.parametrize(
    "tally",
    [
        vector(dtype=np.float64),
        vector(1, 2, 3, 4, dtype=np.float64),
        vector(1, 2, 3, 4, 5, 6, dtype=np.float64),
        np.zeros((1, 5)),
        np.zeros((5, 1)),
        np.array(0.0),
        vector(np.nan, 1, 1, 1, 1, dtype=np.float64),
        vector(np.inf, 1, 1, 1, 1, dtype=np.float64),
        vector(0, 1, np.nan, 1, 1, dtype=np.float64),
        vector(0, 1, 1, 1, np.inf, dtype=np.float64),
        vector(0, 1, -1, 1, 1, dtype=np.float64),
        vector(0, 1, 0.5, 1, 1, dtype=np.float64),
    ],
    ids=repr,
)
def test_what_is_no_tally_is_refused(tally: Any) -> None:
    with pytest.raises(MessageError):
        evaluated(tally)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize("count", [2.0**62, 2.0**63, 1e300])
def test_counts_whose_sum_overflows_are_refused(count: float) -> None:
    with pytest.raises(MessageError):
        evaluated(np.full(5, count))


@pytest.mark.parametrize("loss", [-1.0, 1e308])
def test_a_tally_whose_loss_no_cross_entropy_has_is_refused(loss: float) -> None:
    # One site could otherwise make its round the best for ever, or no round.
    with pytest.raises((MessageError, InvalidReply)):
        evaluated(vector(loss, 3, 1, 0, 4, dtype=np.float64))


@pytest.mark.parametrize("dtype", ["U3", "S3", "complex128", "datetime64[s]", "V8"])
def test_a_tally_of_another_kind_of_number_is_refused(dtype: str) -> None:
    with pytest.raises((MessageError, InvalidReply)):
        evaluated(np.zeros(5, dtype))
