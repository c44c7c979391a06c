"""Whether a masked sum can overflow is decided when the job is read, never in a round."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.matrix import tries

from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import dump_job, load_job, parse_job
from fedgraft.common.errors import JobError
from fedgraft.common.privacy import SecureAggregation
from fedgraft.common.secagg.errors import ParameterError
from fedgraft.common.secagg.graph import plan_graph
from fedgraft.common.secagg.quantize import default_coding
from fedgraft.common.section import IllegalJob

MINIMAL = """\
[job]
name = "tiny"
task = "text-classification"
labels = ["yes", "no"]
[backbone]
source = "builtin:glyph-vit"
[method]
kind = "lora"
head = "shared"
"""


def parse(**section: Any) -> Job:
    """A job with this ``[privacy.secure_aggregation]``, enabled."""
    raw: dict[str, Any] = {
        "job": {"name": "tiny", "task": "text-classification", "labels": ["yes", "no"]},
        "backbone": {"source": "builtin:glyph-vit"},
        "method": {"kind": "lora", "head": "shared"},
        "privacy": {"secure_aggregation": {"enabled": True, **section}},
    }
    return parse_job(raw, where="job.toml")


def accepted(**section: Any) -> SecureAggregation:
    return parse(**section).privacy.secure_aggregation


def refused(**section: Any) -> JobError:
    with pytest.raises(JobError) as caught:
        parse(**section)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    assert "privacy.secure_aggregation" in str(caught.value)
    return caught.value


# --- no sum can overflow


@st.composite
def codings(draw: st.DrawFn) -> tuple[int, int, int]:
    """Sites, bits of the ring and bits of a value, many of them close to the border."""
    ring, value = draw(st.sampled_from([16, 24, 32])), draw(st.integers(2, 32))
    border = ((1 << (ring - 1)) - 1) // ((1 << (value - 1)) - 1) + draw(st.integers(-1, 2))
    sites = draw(st.integers(3, 65535) | st.just(max(3, min(border, 65535))))
    return sites, ring, value


@given(codings())
@settings(deadline=None, max_examples=tries(300))
def test_a_job_is_accepted_if_and_only_if_no_sum_can_overflow(
    numbers: tuple[int, int, int],
) -> None:
    sites, ring, value = numbers
    section = {"max_sites": sites, "ring_bits": ring, "value_bits": value}
    if sites * (2 ** (value - 1) - 1) <= 2 ** (ring - 1) - 1:
        coding = accepted(**section).coding(by_examples=True)
        assert (coding.parties, coding.ring_bits, coding.value_bits) == numbers
    else:
        error = refused(**section)
        assert "overflow" in str(error) or "values fit in it" in str(error)
        for way_out in ("max_sites", "value_bits", "ring_bits = 32"):
            assert way_out in error.hint


@pytest.mark.parametrize(
    ("ring", "value", "most"), [(24, 17, 128), (32, 20, 4096), (16, 9, 128), (32, 17, 32768)]
)
def test_the_last_site_that_fits_is_accepted_and_one_more_is_not(
    ring: int, value: int, most: int
) -> None:
    assert accepted(max_sites=most, ring_bits=ring, value_bits=value)
    assert "overflow" in str(refused(max_sites=most + 1, ring_bits=ring, value_bits=value))


@pytest.mark.parametrize(
    ("sites", "ring", "value"),
    [(3, 24, 20), (10, 24, 20), (128, 24, 17), (129, 32, 20), (2048, 32, 20), (65535, 32, 16)],
)
def test_bits_that_are_not_given_follow_from_the_sites(sites: int, ring: int, value: int) -> None:
    coding = accepted(max_sites=sites).coding(by_examples=True)
    assert (coding.ring_bits, coding.value_bits) == (ring, value)


@pytest.mark.parametrize("sites", [128, 2048])
def test_the_defaults_are_those_of_the_protocol(sites: int) -> None:
    coding, known = accepted(max_sites=sites).coding(by_examples=True), default_coding(sites, 0.1)
    assert (coding.ring_bits, coding.value_bits) == (known.ring_bits, known.value_bits)
    assert SecureAggregation().max_sites == 128


@given(st.integers(3, 65535), st.sampled_from([None, 16, 24, 32]))
@settings(deadline=None)
def test_the_bits_chosen_are_the_most_that_fit_up_to_20(sites: int, ring: int | None) -> None:
    given_ring = {} if ring is None else {"ring_bits": ring}
    room = 2 ** ((ring or (24 if sites <= 128 else 32)) - 1) - 1
    if sites > room:  # not even a sign and one bit
        assert "overflow" in str(refused(max_sites=sites, **given_ring))
        return
    bits = accepted(max_sites=sites, **given_ring).coding(by_examples=True).value_bits
    assert sites * (2 ** (bits - 1) - 1) <= room
    assert bits == 20 or sites * (2**bits - 1) > room


def test_the_sum_of_the_weights_cannot_overflow_either() -> None:
    assert accepted(max_sites=65535, max_weight=65537)  # exactly 2^32 - 1
    error = refused(max_sites=65535, max_weight=65538)
    assert "sums of weights overflow" in str(error)
    assert "max_weight" in error.hint


def test_a_uniform_mean_gives_every_site_the_weight_one() -> None:
    settings = accepted(max_weight=500)
    assert settings.coding(by_examples=True).max_weight == 500
    assert settings.coding(by_examples=False).max_weight == 1


@given(st.integers(3, 65535), st.integers(1, 65537), st.integers(1, 5000))
@settings(deadline=None)
def test_weights_in_tokens_neither_overflow_nor_refuse_a_job(
    sites: int, examples: int, parts: int
) -> None:
    """A language job asks for nothing that a job for labels of the same size would not."""
    section = accepted(max_sites=sites, max_weight=examples)
    most, unit = section.weights(parts)
    assert most == section.coding(by_examples=True, most_parts=parts).max_weight
    assert sites * most < 2**32
    targets = examples * min(parts, 64)
    assert targets <= most * unit < targets + unit
    if parts == 1 or sites * targets < 2**32:
        assert (most, unit) == (targets, 1)


def test_the_coding_clips_where_the_job_says() -> None:
    assert accepted(clip=0.25).coding(by_examples=True).clip == 0.25


def test_bits_that_cannot_work_matter_only_once_masks_are_on() -> None:
    bits = {"max_sites": 129, "ring_bits": 24, "value_bits": 17}
    assert not accepted(enabled=False, **bits).enabled
    refused(**bits)


# --- how many may collude or vanish


@pytest.mark.parametrize(
    ("cohort", "colluders", "dropouts"),
    [(3, 1, 0), (4, 1, 1), (5, 1, 1), (10, 1, 2), (11, 2, 3), (30, 3, 6), (100, 10, 20)],
)
def test_shares_of_a_cohort_become_numbers_of_sites(
    cohort: int, colluders: int, dropouts: int
) -> None:
    assert SecureAggregation().numbers(cohort) == (colluders, dropouts)


shares = st.floats(0, 0.4999) | st.sampled_from([0.0, 0.1, 0.2, 1 / 3, 0.3, 0.49])


@given(st.integers(3, 200), shares, shares)
@settings(deadline=None)
def test_every_cohort_has_a_plan_unless_too_few_are_honest(
    cohort: int, colluding: float, dropping: float
) -> None:
    job = SecureAggregation(colluders=colluding, dropouts=dropping, max_sites=200)
    colluders, dropouts = job.numbers(cohort)
    assert colluders >= max(1, colluding * cohort - 1e-6)
    assert 0 <= dropouts < dropping * cohort + 1
    if colluders + 2 > cohort:
        with pytest.raises(ParameterError):
            plan_graph(cohort, colluders, dropouts)
        with pytest.raises(IllegalJob, match="protects nobody"):
            job.plan(cohort)
        return
    plan = plan_graph(cohort, colluders, dropouts)
    assert job.plan(cohort) == plan
    # As many may vanish as was asked for, unless the others are then too few to sign.
    wanted = math.ceil(round(dropping * cohort, 6))
    assert dropouts == min(wanted, cohort - plan.sign_threshold)


@pytest.mark.parametrize("cohort", [*range(3, 40), 127, 128, 129, 500, 1000])
def test_with_the_default_shares_every_cohort_from_three_on_has_a_plan(cohort: int) -> None:
    plan = SecureAggregation(max_sites=1000).plan(cohort)
    assert plan.colluders >= 1
    assert cohort - plan.dropouts >= plan.fewest_survivors


def test_three_sites_of_which_two_may_collude_protect_nobody() -> None:
    raw = parse(colluders=0.4)
    with pytest.raises(IllegalJob, match="3 sites, 2 of which may collude") as caught:
        raw.check_sites(3)
    assert "a smaller share of colluders" in caught.value.hint
    raw.check_sites(5)


# --- as a user meets it


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A valid job file without a word on privacy."""
    path = tmp_path / "job.toml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def append(path: Path, text: str) -> Path:
    path.write_text(MINIMAL + text, encoding="utf-8")
    return path


def test_one_override_turns_it_on(file: Path) -> None:
    job = load_job(file, ("privacy.secure_aggregation.enabled=true",))
    assert job.privacy.secure_aggregation == SecureAggregation(enabled=True)


def test_the_section_is_read_from_a_file_and_written_back(file: Path) -> None:
    text = "[privacy.secure_aggregation]\nenabled = true\nclip = 0.5\nring_bits = 32\n"
    job = load_job(append(file, text))
    assert job.privacy.secure_aggregation == SecureAggregation(enabled=True, clip=0.5, ring_bits=32)
    assert load_job(append(file, "")).privacy.secure_aggregation == SecureAggregation()
    file.write_text(dump_job(job), encoding="utf-8")
    assert load_job(file) == job


def test_sites_get_the_section_as_it_is() -> None:
    job = parse(clip=0.3, max_sites=40, colluders=0.2)
    sent = Job.model_validate_json(job.for_sites().model_dump_json())
    assert sent.privacy == job.privacy
    assert sent.privacy.secure_aggregation.enabled


def test_an_overflow_in_a_file_names_the_file_and_the_way_out(file: Path) -> None:
    append(file, "[privacy.secure_aggregation]\nenabled = true\nmax_sites = 129\nring_bits = 24\n")
    assert load_job(file)  # the bits of a value follow
    with pytest.raises(JobError) as caught:
        load_job(file, ("privacy.secure_aggregation.value_bits=17",))
    assert str(caught.value) == (
        f"{file}: privacy.secure_aggregation: sums of 129 sites with 17 bits overflow a ring of "
        "24 bits"
    )
    assert "max_sites" in caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("key", "near"), [("max_site", "max_sites"), ("dropout", "dropouts"), ("cliip", "clip")]
)
def test_a_misspelt_key_is_refused_with_the_right_one(key: str, near: str) -> None:
    error = refused(**{key: 1})
    assert f"unknown key privacy.secure_aggregation.{key}" in str(error)
    assert error.hint == f"did you mean {near}?"


@pytest.mark.parametrize(
    ("key", "bad"),
    [("max_sites", 2), ("clip", 0), ("colluders", 3), ("ring_bits", 20), ("max_weight", 1.5)],
)
def test_a_value_out_of_range_is_refused_by_key(key: str, bad: object) -> None:
    error = refused(**{key: bad})
    assert f"privacy.secure_aggregation.{key}" in str(error)
    assert f"got {bad!r}" in str(error)
    assert error.hint == f"mend privacy.secure_aggregation.{key}"
