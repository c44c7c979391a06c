"""What a job says about many sites: how they share a pass, what ranks they have, what is kept."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import dump_job, parse_job
from fedgraft.common.errors import JobError
from fedgraft.common.layout import Layout, cut_rank
from fedgraft.common.section import Cache


def job(*, method: dict[str, Any] | None = None, **simulation: Any) -> Job:
    raw = {
        "job": {"name": "t", "task": "text-classification", "labels": ["no", "yes"]},
        "backbone": {"source": "builtin:x"},
        "method": method or {"kind": "lora", "rank": 8, "head": "shared"},
        "simulation": {"train": "a.csv", "sites": 4, **simulation},
    }
    return parse_job(raw, where="test")


def settings_of(**simulation: Any) -> Any:
    return job(**simulation).simulation


# How many share a pass


def test_how_many_share_a_pass_is_chosen_unless_the_job_says() -> None:
    assert settings_of().sites_per_pass == "auto"
    assert settings_of(sites_per_pass="auto").sites_per_pass == "auto"
    assert [settings_of(sites_per_pass=n).sites_per_pass for n in (1, 7, 256)] == [1, 7, 256]


@pytest.mark.parametrize("bad", [0, -1, 257, "all", 1.5, True, None])
def test_a_number_that_cannot_share_a_pass_is_refused(bad: object) -> None:
    with pytest.raises(JobError, match="sites_per_pass is no number of sites") as caught:
        job(sites_per_pass=bad)
    assert len(str(caught.value).splitlines()) == 1 and "1 to 256" in caught.value.hint


def test_texts_are_not_grouped_by_length_unless_the_job_says() -> None:
    assert not job().training.group_by_length


# Ranks


def test_sites_may_have_ranks_up_to_the_jobs() -> None:
    assert settings_of().ranks == ()
    assert settings_of(ranks=[8, 1, 4]).ranks == (8, 1, 4)


@pytest.mark.parametrize("bad", [[9], [1, 9], [0], [-1]])
def test_a_rank_that_the_adapter_has_no_room_for_is_refused(bad: list[int]) -> None:
    with pytest.raises(JobError, match="ranks"):
        job(ranks=bad)


def test_a_rank_above_the_jobs_is_explained() -> None:
    with pytest.raises(JobError, match="9, more than the job's own rank") as caught:
        job(ranks=[9])
    assert "raise method.rank" in caught.value.hint
    with pytest.raises(JobError, match="more than the job's own rank") as caught:
        job(method={"kind": "head"}, ranks=[1])
    assert "has no rank" in caught.value.hint


# Sizes


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("0B", 0),
        ("10B", 10),
        ("64MB", 64_000_000),
        ("1.5kB", 1500),
        ("4GB", 4_000_000_000),
        (" 2 TB ", 2_000_000_000_000),
        (12345, 12345),
        (0, 0),
    ],
)
def test_a_size_is_read_in_its_unit(written: object, size: int) -> None:
    cache = Cache.model_validate({"memory": written, "disk": written})
    assert (cache.memory, cache.disk) == (size, size)
    assert settings_of(cache={"memory": written}).cache.memory == size


@pytest.mark.parametrize("bad", ["64", "64 MiB", "much", "-1MB", "1e9B", "", -1, True])
def test_what_is_no_size_is_refused(bad: object) -> None:
    with pytest.raises(ValidationError):
        Cache.model_validate({"memory": bad})


def test_text_that_is_no_size_is_refused_with_an_example() -> None:
    with pytest.raises(JobError, match="64MB"):
        job(cache={"memory": "64 megs"})
    with pytest.raises(JobError, match=r"cache\.ram"):
        job(cache={"ram": "1GB"})


def test_a_simulation_keeps_less_in_memory_than_a_site_of_its_own() -> None:
    assert settings_of().cache == Cache(memory=64_000_000, disk=Cache().disk)
    assert settings_of(cache={"disk": "1GB"}).cache.disk == 1_000_000_000


def test_a_job_that_is_written_down_says_the_same() -> None:
    import tomllib

    said = job(ranks=[2, 8], sites_per_pass=3, cache={"memory": "5MB", "disk": "7MB"})
    assert parse_job(tomllib.loads(dump_job(said)), where="test") == said
    assert said.for_sites().simulation is None


# Cutting


def layout(rank: int) -> Layout:
    names = (
        "m.x.lora_A.default.weight",
        "m.y.lora_A.default.weight",
        "m.x.lora_B.default.weight",
        "m.y.lora_B.default.weight",
        "m.modules_to_save.default.weight",
    )
    shapes = ((rank, 5), (rank, 2, 3, 3), (4, rank), (6, rank, 1, 1), (2, 4))
    return Layout(names, shapes)


def part(of: Layout, vector: Any, number: int) -> Any:
    return vector[of.slices[of.names[number]]].reshape(of.shapes[number])


@given(st.integers(1, 6), st.integers(0, 8), st.integers(0, 9))
def test_the_first_components_of_every_path_are_kept(rank: int, kept: int, seed: int) -> None:
    of = layout(rank)
    vector = np.random.default_rng(seed).normal(size=of.size).astype(np.float32)
    before = vector.copy()
    cut = cut_rank(of, vector, kept)
    assert vector.tobytes() == before.tobytes() and cut.dtype == np.float32
    for number in (0, 1):
        whole, left = part(of, vector, number), part(of, cut, number)
        assert (left[:kept] == whole[:kept]).all() and not left[kept:].any()
    for number in (2, 3):
        whole, left = part(of, vector, number), part(of, cut, number)
        assert (left[:, :kept] == whole[:, :kept]).all() and not left[:, kept:].any()
    assert (part(of, cut, 4) == part(of, vector, 4)).all()  # the head has no rank
    assert cut_rank(of, cut, kept).tobytes() == cut.tobytes()
    # The product is that of the kept components.
    a, b = part(of, cut, 0), part(of, cut, 2)
    short = part(of, vector, 2)[:, :kept] @ part(of, vector, 0)[:kept]
    np.testing.assert_allclose(b @ a, short, rtol=0, atol=1e-5)


def test_some_of_the_tensors_can_be_cut_too() -> None:
    of = layout(4)
    vector = np.ones(of.size, np.float32)
    some = of.only(of.names[2:])
    cut = cut_rank(some, of.part(vector, some), 1)
    assert cut.tobytes() == of.part(cut_rank(of, vector, 1), some).tobytes()
