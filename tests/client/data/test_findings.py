"""Rows that stand twice, or in train and test, are counted and told; no cell is."""

import json
from pathlib import Path

import pytest
from support.trainings import make_job

from fedgraft.client.data.findings import Findings, examine
from fedgraft.client.data.rows import SplitRows, read_split
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import dump_job
from fedgraft.common.config.simulation import Simulation
from fedgraft.simulations.cli.check import check

JOB = make_job("bert")
NAMED = JOB.model_copy(update={"job": JOB.job.model_copy(update={"labels": ("no", "yes")})})


def rows(path: Path, texts: list[str], label: object = "0", job: Job = JOB) -> SplitRows:
    lines = (json.dumps({"text": text, "label": label}) + "\n" for text in texts)
    path.write_text("".join(lines))
    return read_split(str(path), job)


@pytest.mark.parametrize(
    ("train", "test", "twice", "overlap"),
    [
        (["a", "b", "c"], ["d"], 0, 0),
        (["a", "a", "b", "a"], ["d"], 2, 0),
        (["a", "b"], ["b", "b", "c"], 0, 2),
        (["a", "A", "a "], ["A"], 0, 1),
        (["a", "a"], [], 1, 0),
    ],
)
def test_rows_are_counted_by_their_content(
    train: list[str], test: list[str], twice: int, overlap: int, tmp_path: Path
) -> None:
    parts = [rows(tmp_path / "train.jsonl", train)]
    others = [rows(tmp_path / "test.jsonl", test)] if test else []
    found = examine(parts, others)
    assert (found.twice, found.overlap) == (twice, overlap)
    assert len(found.notes()) == (twice > 0) + (overlap > 0)


def test_rows_of_two_sites_are_counted_together(tmp_path: Path) -> None:
    one, other = rows(tmp_path / "a.jsonl", ["a", "b"]), rows(tmp_path / "b.jsonl", ["b", "c"])
    assert examine([one, other], []) == Findings({}, indices=False, twice=1, overlap=0)


def test_each_finding_is_a_sentence_in_counts(tmp_path: Path) -> None:
    secret = "a patient's letter"
    found = examine(
        [rows(tmp_path / "train.jsonl", [secret, secret], label=1, job=NAMED)],
        [rows(tmp_path / "test.jsonl", [secret], label=1, job=NAMED)],
    )
    told = " ".join(found.notes())
    assert "Labels are read as indices" in told and secret not in told
    assert "count twice: 1." in told and "stand in the training rows, too: 1." in told
    left_out = Findings({"files of the system": 1200}, indices=False, twice=0, overlap=0)
    assert left_out.notes() == ["Left out, files of the system: 1,200."]


def test_check_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows(tmp_path / "train.jsonl", [*(f"text {n}" for n in range(40)), "text 1"])
    rows(tmp_path / "test.jsonl", ["text 1", "other"])
    simulation = {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl"),
                  "sites": 2, "partition": {"kind": "iid"}}  # fmt: skip
    path = tmp_path / "job.toml"
    path.write_text(dump_job(JOB))
    overrides = [f"simulation.{key}={value!r}" for key, value in simulation.items()
                 if key != "partition"] + ["simulation.partition.kind=iid"]  # fmt: skip
    check(path, overrides, as_json=True)
    told = json.loads(capsys.readouterr().out)["data_notes"]
    assert [note.split(" rows")[0] for note in told] == ["Training", "Test"]


def test_what_a_simulation_keeps_is_known_by_what_is_told(tmp_path: Path) -> None:
    """Litter that came later is told; a cell that is no path, and a hidden label, are no crash."""
    from PIL import Image

    from fedgraft.simulations.data.sources import rows_digest

    small = make_job("vit")
    job = small.model_copy(update={"job": small.job.model_copy(update={"labels": ("a", ".b")})})

    def digest(train: Path) -> str:
        raw = {"train": str(train), "sites": 2, "partition": {"kind": "iid"}}
        return rows_digest(job, Simulation.model_validate(raw))

    for label in ("a", ".b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / "images" / label / "0.png")
    seen = [digest(tmp_path / "images")]
    Image.new("L", (5, 4)).save(tmp_path / "images" / ".b" / "0.png")
    seen.append(digest(tmp_path / "images"))
    (tmp_path / "images" / "a" / "Thumbs.db").write_bytes(b"x")
    seen.append(digest(tmp_path / "images"))
    assert len(set(seen)) == 3
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "A" * 9000, "label": "a"}))
    assert digest(tmp_path / "rows.jsonl")
