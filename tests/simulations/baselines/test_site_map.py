"""The map of the sites: known places are found again, and there is none where there must not be."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import pdist, squareform
from support.federations import digits_job, run_digits, write_digits

from fedgraft.simulations.baselines.site_map import (
    classical_scaling,
    cosines,
    keep_direction,
    map_sites,
    why_absent,
)

ALONE = "simulation.baselines=['local_only']"


@given(st.integers(0, 2**32 - 1), st.integers(3, 12))
def test_places_in_a_plane_are_found_again_up_to_turning(seed: int, count: int) -> None:
    points = np.random.default_rng(seed).normal(size=(count, 2))
    distances = squareform(pdist(points))
    places, explained = classical_scaling(distances)
    np.testing.assert_allclose(squareform(pdist(places)), distances, atol=1e-7)
    assert explained == pytest.approx(1.0)
    again, _ = classical_scaling(distances)
    assert np.array_equal(places, again)


def test_it_is_the_principal_components_of_unit_vectors() -> None:
    from sklearn.decomposition import PCA

    rows = np.random.default_rng(4).normal(size=(9, 40)).astype(np.float32)
    between = cosines(list(rows))
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    places, explained = classical_scaling(np.sqrt(2 - 2 * np.minimum(between, 1)))
    fitted = PCA(2).fit(units)
    np.testing.assert_allclose(np.abs(places), np.abs(fitted.transform(units)), atol=1e-4)
    assert explained == pytest.approx(fitted.explained_variance_ratio_.sum(), rel=1e-4)


def test_cosines_know_same_opposite_and_nothing() -> None:
    one = np.array([1, 2, 0], np.float32)
    found = cosines([one, 5 * one, -one, np.array([0, 0, 3], np.float32), np.zeros(3, np.float32)])
    wanted = [1, 1, -1, 0, 0]
    np.testing.assert_allclose(found[0], wanted, atol=1e-12)
    assert np.array_equal(found, found.T)


def test_a_simulation_in_clear_has_a_map(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "digits", 200, 60)
    one, summary = run_digits(tmp_path / "one", *data, ALONE, "simulation.workers=0")
    found = summary["site_map"]
    assert found["sites"] == [site["name"] for site in summary["sites"]]
    between = np.array(found["cosine"])
    assert between.shape == (3, 3) and np.allclose(np.diag(between), 1, atol=1e-5)
    assert (between[~np.eye(3, dtype=bool)] < 0.999).all()
    assert "Map of 3 sites" in (one.folder / "report.html").read_text("utf-8")


@pytest.mark.slow
def test_under_secure_aggregation_there_is_none_and_the_report_says_why(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "digits", 120, 60)
    masked = "privacy.secure_aggregation.enabled=true"
    run, summary = run_digits(tmp_path / "runs", *data, ALONE, masked, "rounds.count=1")
    assert set(summary["site_map"]) == {"absent"}
    assert not list(run.folder.rglob("direction.npy"))
    page = (run.folder / "report.html").read_text("utf-8")
    assert "secure aggregation, under which nobody sees" in page and "Map of" not in page


@pytest.mark.parametrize(
    ("overrides", "sites", "said"),
    [
        ((ALONE,), 2, "two sites"),
        ((ALONE,), 1, "one site"),
        ((ALONE,), 61, "cannot be read"),
        ((), 3, "local_only"),
        ((ALONE,), 3, ""),
    ],
)
def test_why_there_is_no_map(overrides: tuple[str, ...], sites: int, said: str) -> None:
    found = why_absent(digits_job(*overrides), sites)
    assert said in found and bool(found) == bool(said)


def test_sites_that_could_not_be_trained_are_not_on_it(tmp_path: Path) -> None:
    job, names = digits_job(ALONE), ["a", "b", "c", "d"]
    states = [tmp_path / name for name in names]
    for number, state in enumerate(states[:3]):
        keep_direction(state, np.eye(3, dtype=np.float32)[number])
    assert map_sites(job, states, names)["sites"] == ["a", "b", "c"]
    (states[0] / "direction.npy").unlink()
    assert "could be trained" in map_sites(job, states, names)["absent"]
