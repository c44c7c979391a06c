"""The words of a verdict are the same whatever was measured."""

import pytest

from fedgraft.common.metrics.verdict import Outcome, Rival, Verdict, judge, numbered, tell


def sentence(outcome: Outcome, rival: Rival, **more: str) -> str:
    shown = ("score 3", "2")
    return tell(
        outcome, name="ash", rival=rival, shown=shown, facts="1 block", p_value=0.25, **more
    )


@pytest.mark.parametrize(
    ("outcome", "rival", "wanted"),
    [
        (
            "helped",
            "local_only",
            "At ash the federated model is better than the site's own: score 3 instead of 2 "
            "(1 block).",
        ),
        (
            "hurt",
            "local_only",
            "At ash the federated model is worse than the site's own: score 3 instead of 2 "
            "(1 block).",
        ),
        (
            "helped",
            "zero_shot",
            "At ash the federated model is better than the backbone untouched: score 3 instead of "
            "2 (1 block).",
        ),
        (
            "hurt",
            "zero_shot",
            "At ash the federated model is worse than the backbone untouched: score 3 instead of 2 "
            "(1 block). This is negative transfer.",
        ),
        (
            "unclear",
            "local_only",
            "Unclear for ash: score 3 federated, 2 on its own, and that cannot tell which is "
            "better (1 block, p = 0.25).",
        ),
        (
            "unclear",
            "zero_shot",
            "Unclear for ash: score 3 federated, 2 for the backbone untouched, and that cannot "
            "tell which is better (1 block, p = 0.25).",
        ),
    ],
)
def test_an_outcome_is_told_against_its_rival(outcome: Outcome, rival: Rival, wanted: str) -> None:
    assert sentence(outcome, rival) == wanted


def test_what_cannot_tell_is_named() -> None:
    told = sentence("unclear", "local_only", witness=numbered(1, "1 test example", "test examples"))
    assert "and 1 test example cannot tell" in told
    assert numbered(1234, "1 block", "blocks") == "1,234 blocks"


@pytest.mark.parametrize(
    ("interval", "p_value", "outcome"),
    [
        ((0.1, 0.2), 0.01, "helped"),
        ((-0.2, -0.1), 0.01, "hurt"),
        ((0.0, 0.2), 0.01, "unclear"),
        ((0.1, 0.2), 0.05, "unclear"),
        (None, 0.01, "unclear"),
    ],
)
def test_the_test_and_the_interval_must_agree(
    interval: tuple[float, float] | None, p_value: float, outcome: Outcome
) -> None:
    assert judge(interval, p_value, higher=True) == outcome
    turned: dict[str, Outcome] = {"helped": "hurt", "hurt": "helped"}
    assert judge(interval, p_value, higher=False) == turned.get(outcome, "unclear")


def test_a_verdict_is_plain_json() -> None:
    judged = Verdict("unclear", "x", 0.5, (0.0, 1.0), 0.25)
    assert judged.to_json() == {
        "outcome": "unclear",
        "sentence": "x",
        "difference": 0.5,
        "interval": [0.0, 1.0],
        "p_value": 0.25,
    }
    assert Verdict("unknown", "x", 0.0, None, 1.0).to_json()["interval"] is None
