"""Scores and groups through whole federations: in clear and under masks the same sums."""

import csv
from pathlib import Path

import numpy as np
import pytest
from support.federations import adapter_of, run_digits, write_digits

from fedgraft.common.config.jobfile import load_job
from fedgraft.common.section import IllegalJob
from fedgraft.simulations.cli import simulate as cli

BINS = ("evaluation.score_bins=20", "rounds.count=2")


def with_groups(folder: Path) -> tuple[str, ...]:
    """The digits as tables with a column of groups, most rows of which have one."""
    write_digits(folder, 300, 120)
    for split in ("train", "test"):
        images = sorted((folder / split).rglob("*.png"))
        with (folder / f"{split}.csv").open("w", newline="") as file:
            write = csv.writer(file)
            write.writerow(["image", "label", "ward"])
            for at, image in enumerate(images):
                ward = ("east", "west", "")[at % 3]
                write.writerow([image.relative_to(folder), image.parent.name, ward])
    return (
        f"simulation.train={folder / 'train.csv'}",
        f"simulation.test={folder / 'test.csv'}",
        "data.group=ward",
        "data.groups=['east', 'west', 'north']",
    )


@pytest.mark.slow
def test_masked_rounds_count_what_clear_rounds_count(tmp_path: Path) -> None:
    data = (*with_groups(tmp_path / "rows"), "evaluation.min_group=1", "data.validation=0.3")
    clear, summary = run_digits(tmp_path / "clear", *data, *BINS)
    masked, _ = run_digits(
        tmp_path / "masked", *data, *BINS, "privacy.secure_aggregation.enabled=true"
    )
    ours, theirs = (run.history()[0]["validation"] for run in (clear, masked))
    assert set(ours) == set(theirs)
    for found in (ours, theirs):
        assert 0.3 < found["auroc"] <= 1 and 0 < found["auroc_error"] < 0.2
        assert 0 <= found["calibration_error"] <= 1
        assert found["groups"]["north"] is None and found["accuracy_gap"] is not None
        counted = sum(found["groups"][ward]["examples"] for ward in ("east", "west"))
        assert 0 < counted < found["examples"]
    # The masked adapter is quantised: another by a hair, on the same examples.
    assert ours["examples"] == theirs["examples"]
    assert [g and g["examples"] for g in ours["groups"].values()] == [
        g and g["examples"] for g in theirs["groups"].values()
    ]
    assert ours["auroc"] == pytest.approx(theirs["auroc"], abs=0.05)
    final = summary["final"]["federated"]
    assert final["groups"]["east"]["examples"] == 40 and "auroc" in final


@pytest.mark.slow
def test_in_clear_a_site_keeps_groups_of_a_few_to_itself(tmp_path: Path) -> None:
    data = (*with_groups(tmp_path / "rows"), "evaluation.min_group=1000")
    run, _ = run_digits(tmp_path / "runs", *data, *BINS)
    assert set(run.history()[0]["validation"]["groups"].values()) == {None}


def test_what_is_counted_changes_nothing_that_is_learnt(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "digits", 200, 60)
    plain, _ = run_digits(tmp_path / "plain", *data, "rounds.count=2")
    counted, _ = run_digits(tmp_path / "counted", *data, *BINS)
    assert np.array_equal(adapter_of(plain), adapter_of(counted))
    assert "auroc" not in plain.history()[0]["validation"]


@pytest.mark.parametrize(
    "wrong",
    [
        ("evaluation.score_bins=25",),
        ("data.group=sex",),
        ("data.groups=['a']",),
        ("data.group=sex", "data.groups=['a', 'a']"),
    ],
)
def test_what_cannot_be_counted_is_refused(wrong: tuple[str, ...]) -> None:
    with pytest.raises(Exception) as refused:
        load_job(cli.DEMO, wrong)
    assert getattr(refused.value, "hint", "") and not isinstance(refused.value, IllegalJob)
