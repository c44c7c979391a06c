"""A row is held out of training by its own content, now and in every later job."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.federations import digits_job, write_digits
from support.language_models import job_settings, save_language_model
from support.trainings import make_job

from fedgraft.client.data.rows import read_split
from fedgraft.client.data.splits import held_out
from fedgraft.client.participant import open_participant
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job

TEXTS = [f"case {n}" for n in range(40)]


def out_of(folder: Path, texts: list[str], share: float = 0.25, job: Job | None = None) -> set[str]:
    """The texts that are held out."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": one, "label": "1"}) + "\n" for one in texts))
    out = held_out(read_split(str(path), job or make_job("bert")), share)
    return {text for text, held in zip(texts, out, strict=True) if held}


def test_which_rows_these_are(tmp_path: Path) -> None:
    """A change of this moves rows of every site from one side to the other."""
    held = out_of(tmp_path, TEXTS)
    assert sorted(int(one.split()[1]) for one in held) == [0, 2, 27, 34, 39]


def test_more_rows_and_another_order_move_none(tmp_path: Path) -> None:
    before, more = out_of(tmp_path, TEXTS), [f"later {n}" for n in range(60)]
    mixed = TEXTS + more
    random.Random(1).shuffle(mixed)
    assert before == {one for one in out_of(tmp_path, mixed) if one in TEXTS}
    assert before & set(TEXTS[:20]) == out_of(tmp_path, TEXTS[:20])


def test_neither_the_job_nor_its_seed_moves_one(tmp_path: Path) -> None:
    job = make_job("bert", seed=7)
    job = job.model_copy(update={"job": job.job.model_copy(update={"name": "next"})})
    assert out_of(tmp_path, TEXTS, job=job) == out_of(tmp_path, TEXTS)


@given(
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    texts=st.lists(st.integers(0, 30), max_size=8).map(lambda found: [f"x {n}" for n in found]),
)
def test_a_larger_share_holds_out_all_that_a_smaller_one_does(
    tmp_path_factory: pytest.TempPathFactory, shares: tuple[float, float], texts: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    if texts:
        less, more = (out_of(folder, texts, share) for share in sorted(shares))
        assert less <= more


@given(numbers=st.sets(st.integers(0, 10**6), min_size=2, max_size=9), share=st.floats(0.01, 1))
def test_few_rows_are_on_both_sides(
    tmp_path_factory: pytest.TempPathFactory, numbers: set[int], share: float
) -> None:
    texts = [f"x {n}" for n in numbers]
    held = out_of(tmp_path_factory.mktemp("rows"), texts, share)
    assert 0 < len(held) < len(texts)


def test_equal_rows_are_on_one_side(tmp_path: Path) -> None:
    doubled = [one for text in TEXTS for one in (text,) * 3]
    path = tmp_path / "doubled.jsonl"
    path.write_text("".join(json.dumps({"text": t, "label": "1"}) + "\n" for t in doubled))
    out = held_out(read_split(str(path), make_job("bert")), 0.25)
    assert {doubled[n] for n in np.flatnonzero(out)}.isdisjoint(
        doubled[n] for n in np.flatnonzero(~out)
    )


def test_about_the_share_is_held_out(tmp_path: Path) -> None:
    many = [f"row {n}" for n in range(5000)]
    assert len(out_of(tmp_path, many, 0.2)) == pytest.approx(1000, abs=120)  # four deviations
    assert out_of(tmp_path, many, 0.0) == set()


@pytest.mark.parametrize("text", TEXTS[:12])
def test_a_single_row_is_trained_on(tmp_path: Path, text: str) -> None:
    assert out_of(tmp_path, [text], 0.9) == set()


def test_a_copy_of_an_image_is_on_its_side(tmp_path: Path) -> None:
    write_digits(tmp_path, 40, 3)
    job = digits_job()
    for one in sorted(tmp_path.glob("train/*/*.png")):
        shutil.copyfile(one, one.with_name(f"copy-{one.name}"))
    rows = read_split(str(tmp_path / "train"), job)
    out = held_out(rows, 0.25)
    digests = rows.digests()
    sides = [{d for d, held in zip(digests, out, strict=True) if held == side} for side in (0, 1)]
    assert len(digests) == 80 and all(sides) and sides[0].isdisjoint(sides[1])


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_blocks_of_a_document_are_all_on_one_side(kind: str, tmp_path: Path) -> None:
    """Each document is written in a letter of its own: a block says which one it is of."""
    save_language_model(kind, tmp_path / "backbone")
    lines = [json.dumps({"text": letter * 600}) + "\n" for letter in "abcdefghij"]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    (tmp_path / "site.toml").write_text('name = "a"\n[data]\ntrain = "train.jsonl"\n')
    settings = job_settings(kind, tmp_path / "backbone", str(tmp_path / "*.jsonl"))
    settings.setdefault("data", {})["validation"] = 0.4
    node = {"site": str(tmp_path / "site.toml"), "state": str(tmp_path / "state"), "device": "cpu"}
    splits = open_participant(node).splits(parse_job(settings, where="test"))

    def documents(examples: Any) -> set[int]:
        blocks = getattr(examples, "source", examples)
        spans = zip(blocks.starts, blocks.lengths, strict=True)
        return {int(np.bincount(blocks.ids[a : a + size]).argmax()) for a, size in spans}

    trained, held = documents(splits.train), documents(splits.validation)
    assert trained and held and trained.isdisjoint(held)
    assert len(trained | held) == 10
