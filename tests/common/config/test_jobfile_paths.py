"""Paths in a job file start where they should, and labels may come from a file."""

import os
from pathlib import Path

import pytest
from support.job_files import refused, simulation, write

from fedgraft.common.config.jobfile import load_job

# --- paths


def test_paths_in_the_file_start_at_the_file_and_in_overrides_at_the_working_directory(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    write(file, '"builtin:glyph-vit"', '"path:../models/bert"')
    loaded = load_job(file)
    assert loaded.simulation is not None
    assert loaded.simulation.train == str(file.parent / "train.jsonl")
    assert loaded.backbone.source == f"path:{tmp_path / 'models' / 'bert'}"
    assert loaded.simulation.test is None

    overridden = load_job(
        file,
        ("simulation.train=a.jsonl", "simulation.test=b.jsonl", "backbone.source=path:bert"),
    )
    assert overridden.simulation is not None
    assert overridden.simulation.train == str(elsewhere / "a.jsonl")
    assert overridden.simulation.test == str(elsewhere / "b.jsonl")
    assert overridden.backbone.source == f"path:{elsewhere / 'bert'}"


def test_a_file_named_without_a_folder_is_anchored_all_the_same(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    assert simulation(Path(file.name)).train == str(file.parent / "train.jsonl")


@pytest.mark.parametrize("path", ["/data/x.jsonl", "builtin:digits"])
def test_absolute_and_built_in_data_stay_as_they_are(file: Path, path: str) -> None:
    assert simulation(file, f"simulation.train={path}").train == path


def test_a_backbone_of_the_hub_is_no_path(file: Path) -> None:
    assert load_job(file, ("backbone.source=hf:a/b@c",)).backbone.source == "hf:a/b@c"


@pytest.mark.parametrize("form", ["$FEDGRAFT_T", "${FEDGRAFT_T}"])
def test_environment_variables_in_paths_are_filled_in(
    file: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setenv("FEDGRAFT_T", "/mnt/data")
    assert simulation(file, f"simulation.train={form}/x.jsonl").train == "/mnt/data/x.jsonl"
    assert simulation(write(file, "train.jsonl", f"{form}/y")).train == "/mnt/data/y"


@pytest.mark.parametrize("form", ["$FEDGRAFT_T", "${FEDGRAFT_T}"])
@pytest.mark.parametrize("key", ["simulation.train", "simulation.test", "backbone.source"])
def test_an_environment_variable_that_is_not_set_is_named(
    file: Path, monkeypatch: pytest.MonkeyPatch, key: str, form: str
) -> None:
    monkeypatch.delenv("FEDGRAFT_T", raising=False)
    prefix = "path:" if key == "backbone.source" else ""
    error = refused(file, f"{key}={prefix}{form}/x")
    assert f"{key} = " in str(error)
    assert "FEDGRAFT_T is not set" in str(error)
    assert error.hint.startswith("export FEDGRAFT_T=")


def test_a_dollar_sign_inside_a_variables_value_is_taken_literally(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDGRAFT_T", "/mnt/cash$pot")
    assert simulation(file, "simulation.train=${FEDGRAFT_T}/x").train == "/mnt/cash$pot/x"


def test_a_tilde_is_the_home_folder(file: Path) -> None:
    assert simulation(file, "simulation.train=~/x").train == os.path.expanduser("~/x")


def test_a_path_backbone_without_a_path_is_refused(file: Path) -> None:
    assert "backbone.source" in str(refused(file, "backbone.source=path:"))


# --- labels_from


def test_labels_come_from_a_file_beside_the_job(file: Path) -> None:
    write(file, 'labels = ["yes", "no"]', 'labels_from = "labels.txt"')
    (file.parent / "labels.txt").write_bytes("größe\n\n  card lost \r\nno".encode())
    assert load_job(file).job.labels == ("größe", "card lost", "no")


def test_a_byte_order_mark_is_no_part_of_the_first_label(file: Path) -> None:
    write(file, 'labels = ["yes", "no"]', 'labels_from = "labels.txt"')
    (file.parent / "labels.txt").write_bytes(b"\xef\xbb\xbfyes\nno\n")
    assert load_job(file).job.labels == ("yes", "no")


def test_labels_and_labels_from_together_are_refused(file: Path) -> None:
    error = refused(write(file, "labels =", 'labels_from = "labels.txt"\nlabels ='))
    assert "both labels and labels_from" in str(error)


def test_a_labels_file_that_is_missing_or_no_path_is_refused(file: Path) -> None:
    write(file, 'labels = ["yes", "no"]', 'labels_from = "none.txt"')
    assert str(file.parent / "none.txt") in str(refused(file))
    assert "not a path" in str(refused(write(file, '"none.txt"', "3")))


def test_labels_of_the_file_are_checked_like_any(file: Path) -> None:
    write(file, 'labels = ["yes", "no"]', 'labels_from = "labels.txt"')
    (file.parent / "labels.txt").write_text("yes\nyes\n")
    assert "labels named twice: yes" in str(refused(file))
