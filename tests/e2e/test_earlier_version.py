"""What the version before the wings wrote is still opened: runs, messages and job files."""

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from support.commands import command
from support.earlier import BEFORE, copy_of, copy_run, open_sites, recorded
from support.payload_samples import SAMPLES, assert_equal

from fedgraft.common.config.jobfile import dump_job, load_job, parse_job
from fedgraft.common.layout import Vector
from fedgraft.common.messages.codec import RecordDict, decode, encode
from fedgraft.server.app import coordinate
from fedgraft.server.runs.run_folder import Run

# On one machine the bits are equal; kernels of other processors round differently in the last.
CLOSE = 1e-5
# A masked sum is of whole levels, and a value that is rounded the other way is a level off.
MASKED_CLOSE = 1e-4
MESSAGES: dict[str, str] = recorded("messages.json")
JOBS: dict[str, dict[str, str]] = recorded("jobs.json")


def go_on(folder: Path) -> Vector:
    """Continue a simulation's run; its final adapter."""
    with Run(folder) as run, open_sites(run) as (transport, federation):
        return coordinate(transport, run.job, run, federation=federation)


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def assert_final(adapter: Vector, name: str, tolerance: float) -> None:
    """The adapter is the one that the earlier version came to."""
    final = recorded("finals.json")[name]
    assert adapter.dtype == np.float32 and adapter.size == final["size"]
    stride = max(1, final["size"] // 40)
    np.testing.assert_allclose(adapter[::stride], final["values"], rtol=0, atol=tolerance)


@pytest.mark.usefixtures("old_split")
def test_a_run_goes_on_from_momentum_and_heads_to_the_same_adapter(tmp_path: Path) -> None:
    folder = copy_run("interrupted", tmp_path)
    before = Run(folder).history()
    assert_final(go_on(folder), "interrupted", CLOSE)
    run = Run(folder)
    assert [line["round"] for line in run.history()] == [1, 2, 3]
    assert run.history()[:2] == before  # nothing was done again
    assert [one["round"] for one in run.events() if one["event"] == "resumed"] == [2]
    for site in sorted((folder / "sites").iterdir()):
        kept = sorted(path.name for path in (site / run.session).iterdir())
        assert kept == [f"00000{number}.safetensors" for number in (1, 2, 3)]


@pytest.mark.usefixtures("old_split")
def test_a_masked_run_goes_on_in_rounds_that_no_site_has_answered(tmp_path: Path) -> None:
    folder = copy_run("masked", tmp_path)
    sites = sorted(path.parent for path in (folder / "sites").glob("*/identity.pem"))
    claimed = [lines(site / Run(folder).session / "claims") for site in sites]
    pledged = [lines(site / "sums") for site in sites]
    assert_final(go_on(folder), "masked", MASKED_CLOSE)
    run = Run(folder)
    history = run.history()
    assert [line["masked"]["survivors"] for line in history] == [3, 3]
    assert [line["dropped"] for line in history] == [[], []]  # nobody was asked in vain
    assert (folder / "masked_rounds").read_text() == "4\n"
    stages = ("KEYS", "SHARES", "TRAIN", "CONFIRM", "UNMASK")
    for site, claims, pledges in zip(sites, claimed, pledged, strict=True):
        new = [f"{number} {stage}" for number in (3, 4) for stage in stages]
        assert lines(site / run.session / "claims") == [*claims, *new]
        sums = lines(site / "sums")
        assert sums[:2] == pledges and len(set(sums)) == 4
        assert {line.split()[1] for line in sums} == {pledges[0].split()[1]}  # of the same sites


def test_a_finished_run_is_given_away_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = copy_run("finished", tmp_path), tmp_path / "given"
    code, _, errors = command(capsys, "export", str(folder), "--out", str(out))
    assert code == 0, errors
    files = {path.name for path in (folder / "adapter").iterdir()}
    assert {path.name for path in out.iterdir()} == files
    assert len(files) == 4
    for name in files - {"adapter_config.json"}:
        assert (out / name).read_bytes() == (folder / "adapter" / name).read_bytes(), name
    # PEFT writes a set in it, in the order of the process, and its own version.
    new, old = (config_in(place) for place in (out, folder / "adapter"))
    # The hub might have a stranger's "glyph-vit": the name is no longer one that it can have.
    assert new.pop("base_model_name_or_path").startswith("builtin:glyph-vit sha256:")
    assert old.pop("base_model_name_or_path") == "glyph-vit"
    assert {key: new[key] for key in old} == old


def config_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    del found["peft_version"]
    return found | {"target_modules": sorted(found["target_modules"])}


def test_a_finished_run_is_reported_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_run("finished", tmp_path)
    code, out, errors = command(capsys, "report", str(folder), "--json")
    assert code == 0, errors
    assert json.loads(out) == {"run": folder.name, "report": str(folder / "report.html")}
    page = (folder / "report.html").read_text(encoding="utf-8")
    summary = recorded("finished/summary.json")
    shown = [site["verdict"] for site in summary["sites"]]
    shown += [folder.name, f"{100 * summary['final']['federated']['accuracy']:.1f}"]
    assert len(shown) == 5
    assert [text for text in shown if text not in page] == []


def test_runs_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("finished", "interrupted", "masked")
    folders = {name: copy_run(name, tmp_path) for name in names}
    code, out, _ = command(capsys, "runs", str(tmp_path), "--json")
    assert code == 0
    listed = {Path(line["folder"]): line for line in json.loads(out)["runs"]}
    assert listed.keys() == set(folders.values())
    rounds = {"finished": (3, 3), "interrupted": (2, 3), "masked": (1, 2)}
    for name, folder in folders.items():
        facts, line = recorded(f"{name}/run.json"), listed[folder]
        assert (line["run"], line["created"]) == (facts["run"], facts["created"])
        assert (line["rounds"], line["of_rounds"]) == rounds[name]
        assert (line["status"] == "finished") == (name == "finished")
    accuracy = recorded("finished/summary.json")["final"]["federated"]["accuracy"]
    assert listed[folders["finished"]]["accuracy"] == accuracy


def wire(record: RecordDict) -> bytes:
    return bytes(recorddict_to_proto(record).SerializeToString(deterministic=True))


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_is_read_and_is_the_same_bytes_again(name: str) -> None:
    sample, told = SAMPLES[name], MESSAGES[name]
    kind, _, digest = told.partition(":")
    if kind == "sha256":
        content = wire(encode(sample))
        assert hashlib.sha256(content).hexdigest() == digest
    else:
        content = bytes.fromhex(told)
    payload = decode(recorddict_from_proto(RecordDictProto.FromString(content)), type(sample))
    assert_equal(payload, sample)
    assert wire(encode(payload)) == content


@pytest.mark.parametrize("name", JOBS)
def test_a_job_file_is_the_same_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("FEDGRAFT_DATA", "/nowhere")
    folder = copy_of("jobs", tmp_path.resolve())
    job = load_job(folder / name)
    texts = {
        "json": job.model_dump_json(),
        "toml": dump_job(job),
        "sites": job.for_sites().model_dump_json(),
    }
    for form, text in texts.items():
        digest = hashlib.sha256(text.replace(str(folder), "FOLDER").encode()).hexdigest()
        assert digest == JOBS[name][form], form
    assert parse_job(tomllib.loads(texts["toml"]), where=name) == job


def test_the_built_in_job_is_the_same_key_by_key() -> None:
    job = load_job(BEFORE / "jobs" / "digits.toml")
    assert json.loads(job.model_dump_json()) == recorded("jobs/digits.json")
    assert {path.name for path in (BEFORE / "jobs").glob("*.toml")} == JOBS.keys()
