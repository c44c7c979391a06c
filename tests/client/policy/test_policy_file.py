"""The policy: what is just inside passes, what is just outside is refused by its own code."""

from dataclasses import replace
from datetime import datetime, time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.masked_federations import make_job

from fedgraft.client.policy.policy_file import Hours, Policy, RoundFacts, check_plan, load_policy
from fedgraft.common.config.training import Consolidation, DomainAdaptation
from fedgraft.common.errors import JobError, SiteFailure

DIGEST = "ab" * 32
NOON = datetime(2030, 1, 1, 12, 0)
CLEAR = {"secure_aggregation": "allowed", "min_cohort": 1, "min_examples": 1, "min_local_steps": 1}
ALL: dict[str, Any] = {
    "model": {"allowed_backbones": {"glyph-vit": f"sha256:{DIGEST}"}, "allowed_methods": ["lora"]},
    "privacy": {"min_examples": 10, "min_local_steps": 2},
    "limits": {"max_rounds": 5, "max_bytes_out_per_round": "1kB"},
    "metrics": {"allowed": ["loss", "accuracy", "f1"]},
}
DOCUMENTED = f"""
[model]
allowed_backbones = {{ "all-MiniLM-L6-v2" = "sha256:{DIGEST}" }}
allowed_methods = ["lora", "head"]
max_rank = 16
[privacy]
secure_aggregation = "required"
min_cohort = 3
max_colluding = 1
max_epsilon_total = 8.0
delta = 1e-5
min_examples = 200
min_local_steps = 4
[limits]
max_rounds = 50
max_bytes_out_per_round = "20MB"
hours = "20:00-06:00"
[metrics]
allowed = ["loss", "accuracy", "f1"]
round_to = 3
[approval]
mode = "ask"
"""


def policy(**sections: dict[str, Any]) -> Policy:
    """ALL, with these keys of these sections."""
    changed = {name: {**ALL.get(name, {}), **keys} for name, keys in sections.items()}
    return Policy.model_validate(ALL | changed)


def code(rules: Policy, facts: RoundFacts) -> str:
    """What the refusal says; empty if there is none."""
    try:
        check_plan(rules, facts)
    except SiteFailure as error:
        return error.code
    return ""


def facts(**changes: Any) -> RoundFacts:
    return replace(RoundFacts(make_job(), NOON, frozenset({DIGEST})), **changes)


def masked(colluders: float) -> Any:
    return make_job(privacy={"colluders": colluders})


INSIDE_AND_OUTSIDE = [
    ("backbone", {}, {"digests": frozenset({DIGEST})}, {"digests": frozenset({"cd" * 32})}),
    ("backbone", {}, {"digests": None}, {"digests": frozenset()}),
    ("rank", {"model": {"max_rank": 4}}, {"job": make_job(method={"rank": 4})},
     {"job": make_job(method={"rank": 5})}),
    ("cohort", {"privacy": {"min_cohort": 5}}, {"job": make_job(min_sites=5)},
     {"job": make_job(min_sites=4)}),
    ("cohort", {}, {"job": make_job(min_sites=1), "cohort": 3}, {"cohort": 2}),
    ("cohort", {}, {"cohort": 5, "survivors": 3}, {"cohort": 5, "survivors": 2}),
    ("colluding", {"privacy": {"max_colluding": 2}}, {"job": masked(0.4), "cohort": 5},
     {"job": masked(0.2), "cohort": 5}),
    ("epsilon", {}, {"epsilon": 8.0}, {"epsilon": 8.01}),
    ("examples", {}, {"documents": 10}, {"documents": 9}),
    ("steps", {}, {"examples": 10}, {"examples": 16, "job": make_job().model_copy(
        update={"training": make_job().training.model_copy(update={"batch_size": 16})})}),
    ("rounds", {}, {"job": make_job(count=5)}, {"job": make_job(count=6)}),
    ("rounds", {}, {"job": make_job(count=4), "round": 4}, {"job": make_job(count=4), "round": 5}),
    ("bytes", {}, {"bytes_out": 1000}, {"bytes_out": 1001}),
    ("hours", {"limits": {"hours": "12:00-13:00"}}, {"now": NOON},
     {"now": NOON.replace(hour=13)}),
    ("hours", {"limits": {"hours": "20:00-06:00"}}, {"now": NOON.replace(hour=5, minute=59)},
     {"now": NOON.replace(hour=6)}),
]  # fmt: skip


@pytest.mark.parametrize(("about", "rules", "inside", "outside"), INSIDE_AND_OUTSIDE)
def test_just_inside_passes_and_just_outside_is_refused(
    about: str, rules: dict[str, Any], inside: dict[str, Any], outside: dict[str, Any]
) -> None:
    assert code(policy(**rules), facts(**inside)) == ""
    assert code(policy(**rules), facts(**outside)) == f"policy-{about}"


def test_a_method_that_is_not_named_is_refused() -> None:
    assert code(policy(model={"allowed_methods": ["head"]}), facts()) == "policy-method"
    assert code(policy(model={"allowed_methods": ["head", "lora"]}), facts()) == ""
    coral = make_job().training.model_copy(update={"domain": DomainAdaptation(kind="coral")})
    adapting = facts(job=make_job().model_copy(update={"training": coral}))
    assert code(policy(), adapting) == "policy-domain"
    assert code(policy(model={"allowed_methods": ["lora", "domain"]}), adapting) == ""
    ewc = make_job().training.model_copy(update={"consolidation": Consolidation()})
    remembered = facts(job=make_job().model_copy(update={"training": ewc}))
    assert code(policy(), remembered) == "policy-consolidation"
    assert code(policy(model={"allowed_methods": ["lora", "consolidation"]}), remembered) == ""


def test_updates_in_clear_are_for_those_who_allow_them() -> None:
    clear = facts(job=make_job(masked=False, min_sites=3))
    assert code(policy(), clear) == "policy-secure-aggregation"
    assert code(policy(privacy={"secure_aggregation": "allowed"}), clear) == ""


@pytest.mark.parametrize("validation", [0.0, 0.25])
@pytest.mark.parametrize("allowed", [[], ["loss"], ["loss", "f1"], ["loss", "accuracy", "f1"]])
def test_all_that_a_reply_in_clear_reveals_must_be_allowed(
    allowed: list[str], validation: float
) -> None:
    job = make_job(masked=False, validation=validation)
    enough = len(allowed) == 3 if validation else "loss" in allowed
    said = code(policy(privacy=CLEAR, metrics={"allowed": allowed}), facts(job=job))
    assert said == ("" if enough else "policy-metrics")
    assert code(policy(metrics={"allowed": []}), facts(job=make_job(validation=validation))) == ""


@pytest.mark.parametrize("name", ["glyph-vit", "builtin:glyph-vit"])
def test_a_backbone_goes_by_its_name_and_its_digest(name: str) -> None:
    rules = policy(model={"allowed_backbones": {name: f"sha256:{DIGEST}"}})
    assert code(rules, facts()) == ""
    other = policy(model={"allowed_backbones": {"other": f"sha256:{DIGEST}"}})
    assert code(other, facts()) == "policy-backbone"


@pytest.mark.parametrize(
    "name", ["hf:a/b@main", "a/b@main", "a/b", "b"], ids=["source", "revision", "path", "last"]
)
def test_a_backbone_of_a_hub_has_shorter_names(name: str) -> None:
    job = make_job()
    far = job.backbone.model_copy(update={"source": "hf:a/b@main"})
    rules = policy(model={"allowed_backbones": {name: f"sha256:{DIGEST}"}})
    assert code(rules, facts(job=job.model_copy(update={"backbone": far}))) == ""
    assert code(rules, facts()) == "policy-backbone"


def test_an_empty_policy_allows_nothing() -> None:
    assert code(Policy(), facts()) == "policy-backbone"


@given(start=st.times(), end=st.times(), now=st.times())
def test_hours_and_their_complement_make_a_day(start: time, end: time, now: time) -> None:
    start, end = start.replace(second=0, microsecond=0), end.replace(second=0, microsecond=0)
    if start == end:
        return
    inside = Hours(start=start, end=end).include(now)
    assert inside != Hours(start=end, end=start).include(now)
    assert Hours(start=start, end=end).include(start)
    assert not Hours(start=start, end=end).include(end)


@given(
    rank=st.integers(1, 64), count=st.integers(1, 60), sent=st.integers(0, 2000),
    texts=st.integers(0, 40),
)  # fmt: skip
def test_a_job_passes_exactly_when_all_bounds_hold(
    rank: int, count: int, sent: int, texts: int
) -> None:
    job = make_job(method={"rank": rank}, count=count)
    # Texts are read in many blocks, and the policy counts texts.
    said = code(policy(), facts(job=job, bytes_out=sent, examples=900, documents=texts))
    holds = rank <= 16 and count <= 5 and sent <= 1000 and texts >= 10
    assert (said == "") == holds


# The file


def written(folder: Path, text: str) -> Path:
    path = folder / "policy.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_documented_policy_loads(tmp_path: Path) -> None:
    rules = load_policy(written(tmp_path, DOCUMENTED))
    assert rules.limits.max_bytes_out_per_round == 20_000_000
    assert str(rules.limits.hours) == "20:00-06:00"
    words = " ".join(rules.in_words())
    for said in ("all-MiniLM-L6-v2", "only masked", "200 examples", "20:00 and 06:00", "approves"):
        assert said in words


def test_a_hash_is_of_what_a_policy_says(tmp_path: Path) -> None:
    first = load_policy(written(tmp_path, DOCUMENTED))
    spaced = DOCUMENTED.replace(" = ", "=").replace('"20MB"', "20000000")
    assert load_policy(written(tmp_path, spaced)).hash == first.hash
    changed = DOCUMENTED.replace("max_rank = 16", "max_rank = 17")
    assert load_policy(written(tmp_path, changed)).hash != first.hash


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[limit]", "unknown key limit", "did you mean limits?"),
        ("[limits]\nmax_round = 3", "unknown key limits.max_round", "did you mean max_rounds?"),
        ("[limits]\nmax_rounds = true", "a number is wanted", "mend max_rounds"),
        ("[limits]\nmax_rounds = 0", "limits.max_rounds: ", "mend limits.max_rounds"),
        ('[limits]\nhours = "20-06"', "limits.hours: no span", '"20:00-06:00"'),
        ('[limits]\nhours = "24:00-06:00"', "limits.hours: no span", '"20:00-06:00"'),
        ('[limits]\nhours = "06:00-06:00"', "limits.hours: no span", '"20:00-06:00"'),
        ("[limits]\nhours = 5", "limits.hours: no span", '"20:00-06:00"'),
        ('[limits]\nmax_bytes_out_per_round = "lots"', "write a size as", "mend"),
        ('[model]\nallowed_backbones = { a = "b" }', "allowed_backbones.a is no digest", "sha256:"),
        ('[model]\nallowed_methods = ["full"]', "model.allowed_methods", "mend"),
        ('[privacy]\nsecure_aggregation = "maybe"', "privacy.secure_aggregation", "mend"),
        ("[privacy]\nmax_epsilon_total = 2.0", "no job has differential privacy", "leave them out"),
        ("[privacy]\ndelta = 1e-6", "no job has differential privacy", "leave them out"),
        ('[metrics]\nallowed = ["auc"]', "metrics.allowed", "mend"),
        ("model = 3", "model: a section, not a value", "[model]"),
        ("[model", "not valid TOML", "mend that line"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, message: str, hint: str) -> None:
    with pytest.raises(JobError) as caught:
        load_policy(written(tmp_path, text))
    assert message in str(caught.value)
    assert hint in caught.value.hint


def test_a_missing_policy_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no file"):
        load_policy(tmp_path / "policy.toml")
