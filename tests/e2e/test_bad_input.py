"""Bad input: a clear error, a hint, exit code 2, and nothing left behind."""

import json
import shutil
from pathlib import Path

import pytest
from support.commands import command
from support.federations import write_digits

from fedgraft.common.backbones.load import BUILTIN

TEXT_JOB = """
[job]
name = "texts"
task = "text-classification"
labels = ["yes", "no"]
[backbone]
source = "path:backbone"
[method]
kind = "lora"
targets = ["query"]
head = "shared"
[rounds]
count = 1
[simulation]
sites = 2
train = "train.jsonl"
partition = { kind = "iid" }
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a good text job: every test breaks one thing in it."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    backbone = tmp_path / "backbone"
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertForSequenceClassification(config).save_pretrained(backbone)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(30))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(backbone)
    rows = [{"text": f"w{n % 30} w3", "label": ("yes", "no")[n % 2]} for n in range(40)]
    write_rows(tmp_path, rows)
    (tmp_path / "job.toml").write_text(TEXT_JOB)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(folder: Path, rows: list[dict[str, str]]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(lines, encoding="utf-8")


def refused(
    capsys: pytest.CaptureFixture[str], place: Path, what: str, hint: str, *options: str
) -> None:
    for verb in ("check", "simulate"):
        code, out, err = command(capsys, verb, "job.toml", *options)
        assert code == 2, err
        assert "error:" in err and what in err, err
        assert "hint:" in err and hint in err, err
        assert "Traceback" not in err
        assert out == ""
        assert not (place / "runs").exists(), "a refused job left a run behind"


def test_the_job_is_good_before_a_test_breaks_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = command(capsys, "check", "job.toml", "--json")
    assert code == 0, err
    assert json.loads(out)["trained_parameters"] > 0


@pytest.mark.parametrize(
    ("old", "new", "what", "hint"),
    [
        ("count = 1", "cuont = 1", "unknown key rounds.cuont", "did you mean count?"),
        ("[rounds]", "[ruonds]", "unknown key ruonds", "did you mean rounds?"),
        ("count = 1", 'count = "many"', "rounds.count", "mend rounds.count"),
        (
            "count = 1",
            "count = 1\ncohort = 3",
            "cohort = 3 is larger than the 2 sites",
            "rounds.cohort = 2",
        ),
        (
            "count = 1",
            "count = 1\nmin_sites = 3",
            "min_sites = 3 can never be reached",
            "lower rounds.min_sites",
        ),
        ('["query"]', '["quary"]', "'quary' matches no module", "did you mean 'query'?"),
        ('"train.jsonl"', '"trian.jsonl"', "trian.jsonl", ""),
        ('["yes", "no"]', '["yes", "maybe"]', "no", ""),
        ("count = 1", "count = ", "is not valid TOML", "mend that line"),
        ('"path:backbone"', '"builtin:nothing"', "no built-in backbone", "glyph-vit"),
    ],
)
def test_a_wrong_job_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, what: str, hint: str
) -> None:
    assert old in TEXT_JOB
    (place / "job.toml").write_text(TEXT_JOB.replace(old, new, 1))
    refused(capsys, place, what, hint)


@pytest.mark.parametrize("poison", ["sign-flip", "noise", "nan"])
def test_poison_of_masked_updates_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], poison: str
) -> None:
    faults = ("poisoned=0.5", f"poison={poison}")
    options = [word for one in faults for word in ("--set", f"simulation.faults.{one}")]
    more = ("simulation.sites=5", "privacy.secure_aggregation.enabled=true")
    options += [word for one in more for word in ("--set", one)]
    refused(capsys, place, "masks cannot be altered", 'poison = "labels"', *options)


@pytest.mark.parametrize("fault", ["dropout", "stragglers", "poisoned"])
def test_faults_on_another_engine_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    options = ("--set", f"simulation.faults.{fault}=0.5", "--engine", "ray")
    code, out, err = command(capsys, "simulate", "job.toml", *options)
    assert code == 2 and out == ""
    assert "error: faults are played by the local engine" in err
    assert "hint: --engine local" in err and "Traceback" not in err
    assert not (place / "runs").exists()


def test_a_missing_job_file_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "job.toml").unlink()
    refused(capsys, place, "no file job.toml", "fedgraft init")


def test_an_empty_data_file_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "train.jsonl").write_text("")
    refused(capsys, place, "train.jsonl", "")


def test_a_missing_column_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(place, [{"txet": "w1", "label": "yes"}])
    refused(capsys, place, "text", "txet")


def test_a_label_outside_the_list_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(place, [{"text": "w1", "label": "yes"}, {"text": "w2", "label": "noo"}])
    refused(capsys, place, "noo", "no")


def test_data_that_is_not_utf8_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "train.jsonl").write_bytes(b'{"text": "caf\xe9", "label": "yes"}\n')
    refused(capsys, place, "UTF-8", "")


def test_pickle_weights_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "backbone" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(capsys, place, "pytorch_model.bin", "safetensors")


def test_an_image_that_does_not_decode_is_refused_or_left_out(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_digits(place / "digits", 60, 30)
    (place / "digits" / "train" / "0" / "broken.png").write_bytes(b"not an image")
    shutil.copyfile(BUILTIN.parents[3] / "simulations/fedgraft/simulations/demo/digits.toml", "d")
    shutil.move("d", "job.toml")
    small = [*data, "simulation.sites=2", "simulation.partition={kind='iid', min_examples=2}"]
    options = [word for override in small for word in ("--set", override)]
    refused(capsys, place, "broken.png", "on_bad_image", *options)
    skip = ("--set", "data.on_bad_image=skip", "--json")
    code, out, err = command(capsys, "check", "job.toml", *options, *skip)
    assert code == 0, err
    assert json.loads(out)["skipped_files"] == 1


def test_a_folder_that_cannot_be_written_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "file").write_text("")
    code, _, err = command(capsys, "simulate", "job.toml", "--runs", "file/runs")
    assert code == 2
    assert "cannot write" in err and "--runs" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("simulate", "--engine", "boat"),
        ("simulate", "job.toml", "--resume", "somewhere"),
        ("simulate", "--resume", "nowhere"),
        ("report", "nowhere"),
        ("export", "nowhere"),
        ("runs", "nowhere"),
        ("init", "job.toml"),
        ("init", "new.toml", "--template", "boat"),
        ("simulate", "job.toml", "--set", "rounds"),
        ("simulate", "job.toml", "--nonsense"),
        ("nonsense",),
    ],
)
def test_wrong_arguments_exit_with_2(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    code, _, err = command(capsys, *arguments)
    assert code == 2
    assert "Traceback" not in err
    assert "rror:" in err
