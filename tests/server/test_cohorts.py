"""Who is asked in a round: the same whoever counts, and everybody sooner or later."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.rounds_in_memory import Site, federate, make_job

from fedgraft.server.rounds import choose_cohort

# Cohorts

NAMES = [f"site-{number}" for number in range(10)]
subsets = st.sets(st.sampled_from(NAMES), min_size=4).map(sorted)


@given(subsets, st.integers(1, 50), st.integers(0, 5), st.randoms(use_true_random=False))
def test_a_cohort_does_not_depend_on_the_order_of_the_sites(
    sites: list[str], number: int, seed: int, shuffle: Any
) -> None:
    job = make_job(rounds={"cohort": 3})
    job = job.model_copy(update={"job": job.job.model_copy(update={"seed": seed})})
    chosen = choose_cohort(job, sites, number)
    assert len(set(chosen)) == 3 and set(chosen) <= set(sites)
    shuffled = list(sites)
    shuffle.shuffle(shuffled)
    assert choose_cohort(job, shuffled, number) == chosen


@given(subsets, st.integers(1, 50))
def test_a_chosen_site_is_chosen_when_others_stay_away(sites: list[str], number: int) -> None:
    job = make_job(rounds={"cohort": 3})
    everyone = set(choose_cohort(job, NAMES, number))
    assert everyone & set(sites) <= set(choose_cohort(job, sites, number))


def test_every_site_is_chosen_sooner_or_later_and_about_as_often() -> None:
    job = make_job(rounds={"cohort": 3})
    chosen = [site for number in range(1, 401) for site in choose_cohort(job, NAMES, number)]
    counts = [chosen.count(site) for site in NAMES]
    assert 85 <= min(counts) <= max(counts) <= 155  # 120 expected, standard deviation 9


def test_cohorts_differ_between_rounds_and_between_seeds() -> None:
    job = make_job(rounds={"cohort": 3})
    other = job.model_copy(update={"job": job.job.model_copy(update={"seed": 1})})
    rounds = [choose_cohort(job, NAMES, number) for number in range(1, 11)]
    assert len(set(rounds)) > 5
    assert rounds != [choose_cohort(other, NAMES, number) for number in range(1, 11)]


@pytest.mark.parametrize(
    ("rounds", "size"),
    [({}, 10), ({"cohort": 4}, 4), ({"cohort": 99}, 10), ({"fraction": 0.25}, 2),
     ({"fraction": 0.01}, 1), ({"fraction": 1.0}, 10)],
)  # fmt: skip
def test_a_cohort_has_the_size_that_the_job_says(rounds: dict[str, Any], size: int) -> None:
    assert len(choose_cohort(make_job(rounds=rounds), NAMES, 1)) == size


def test_only_the_cohort_is_asked() -> None:
    sites = [Site(name) for name in NAMES]
    job = make_job(rounds={"cohort": 2, "count": 4})
    federate(job, sites)
    for number in range(1, 5):
        cohort = choose_cohort(job, NAMES, number)
        for site in sites:
            asked = any(request.round == number for request in site.trained)
            assert asked == (site.name in cohort)
            assert asked == any(request.round == number for request in site.evaluated)
