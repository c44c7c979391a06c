"""A sweep from its command: a run for each cell, a table over them, and nothing lost to a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from e2e.superlink import PATIENCE
from support.commands import command
from support.federations import SMALL, adapter_of, run_digits, write_digits

from fedgraft.common.console import Console
from fedgraft.server.runs.run_folder import Run, list_runs
from fedgraft.simulations.cli import simulate as cli
from fedgraft.simulations.sweep import run as sweep
from fedgraft.simulations.sweep.grid import make_cells, read_axes

RATES = "training.learning_rate=1e-3,1e-2"
TINY = (*(one for one in SMALL if not one.startswith(("rounds", "simulation.sites"))),
        "simulation.sites=2")  # fmt: skip
UNSTABLE = {"seconds", "peak_memory_mb"}  # of a machine, not of a job


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return write_digits(tmp_path_factory.mktemp("digits"), 60, 30)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sets(*items: str) -> list[str]:
    return [word for item in items for word in ("--set", item)]


def stable(results: dict[str, Any]) -> dict[str, Any]:
    """Results without what differs from one execution to the next."""
    cells = [
        {key: cell[key] for key in cell if key not in ("run", "metrics")}
        | {key: value for key, value in cell["metrics"].items() if key not in UNSTABLE}
        for cell in results["cells"]
    ]
    rows = [{key: row[key] for key in row if key not in UNSTABLE} for row in results["rows"]]
    rest = {key: results[key] for key in results if key not in ("sweep", "folder")}
    return rest | {"cells": cells, "rows": rows}


@pytest.mark.slow
def test_a_sweep_makes_a_run_for_each_cell_and_a_table_over_them(
    place: Path, capsys: pytest.CaptureFixture[str], data: tuple[str, ...]
) -> None:
    options = sets(*TINY, *data, "rounds.count=2", RATES)
    code, out, err = command(capsys, "sweep", *options, "--seeds", "2")
    assert code == 0, err
    assert "cell 3/4  learning_rate=1e-3 seed=1\n" in err
    assert "cell 3/4  done  valid. " in err and " s left\n" in err
    (folder,) = (place / "sweeps").iterdir()
    for name in ("sweep.json", "results.json", "table.md", "sweep.png", "sweep.html"):
        assert (folder / name).stat().st_size > 100
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    table = (folder / "table.md").read_text()
    assert [line.endswith(" best") for line in map(str.rstrip, out.splitlines())].count(True) == 1
    assert table.count(" best |") == 1
    assert "over 2 seeds" in out and "Best by federated validation accuracy: learning_rate=" in out

    results = json.loads((folder / "results.json").read_text())
    assert [cell["status"] for cell in results["cells"]] == ["finished"] * 4
    assert [cell["seed"] for cell in results["cells"]] == [0, 0, 1, 1]
    assert [row["cells"] for row in results["rows"]] == [[1, 3], [2, 4]]
    for row in results["rows"]:
        both = [results["cells"][at - 1]["metrics"]["test"] for at in row["cells"]]
        assert row["test"]["mean"] == pytest.approx(sum(both) / 2)
    code, out, _ = command(capsys, "runs", str(folder / "runs"), "--json")
    assert [run["status"] for run in json.loads(out)["runs"]] == ["finished"] * 4
    # a cell is the run that simulate would have made of it
    alone, summary = run_digits(place / "alone", *TINY, *data, "rounds.count=2",
                                "training.learning_rate=1e-2", "job.seed=1")  # fmt: skip
    last = results["cells"][3]
    assert np.array_equal(adapter_of(Run(folder / "runs" / last["run"])), adapter_of(alone))
    assert last["metrics"]["test"] == summary["final"]["federated"]["accuracy"]


@pytest.mark.slow
def test_killed_in_the_second_cell_it_loses_nothing_but_the_round(
    place: Path, capsys: pytest.CaptureFixture[str], data: tuple[str, ...]
) -> None:
    options = sets(*TINY, *data, "rounds.count=8", RATES)
    code, truth, err = command(capsys, "sweep", *options, "--sweeps", "truth", "--json", "-q")
    assert code == 0 and err == ""
    process = start(*options)
    wait_for(process, place, "*/runs/*/summary.json", 1)
    wait_for(process, place, "*/runs/*/checkpoints/round-*", 3)  # two of the first run are kept
    (folder,) = (place / "sweeps").iterdir()
    code, _, err = command(capsys, "sweep", "--resume", str(folder))
    assert code == 1 and f"error: {folder} is in use by another process" in err
    process.kill()
    process.wait()
    first, second = list_runs(folder / "runs")
    assert first.summary() is not None and second.summary() is None
    before = first.events()

    code, out, err = command(capsys, "sweep", "--resume", str(folder), "--json")
    assert code == 0, err
    assert "cell 2/2" in err and "cell 1/2" not in err
    assert stable(json.loads(out)) == stable(json.loads(truth))
    assert json.loads(out) == json.loads((folder / "results.json").read_text())
    assert first.events() == before
    assert [event["event"] for event in second.events()].count("resumed") == 1
    assert len(list_runs(folder / "runs")) == 2
    last = json.loads(truth)["cells"][1]["run"]
    (whole,) = (place / "truth").iterdir()
    assert np.array_equal(adapter_of(second), adapter_of(Run(whole / "runs" / last)))


def start(*options: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "fedgraft", "sweep", "-q", *options], stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


def wait_for(process: "subprocess.Popen[bytes]", place: Path, pattern: str, count: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while len(list((place / "sweeps").glob(pattern))) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
def test_a_cell_that_fails_is_written_down_and_the_others_run(
    place: Path, capsys: pytest.CaptureFixture[str], data: tuple[str, ...]
) -> None:
    options = sets(*TINY, *data, "rounds.count=1", "training.learning_rate=1e30,1e-3")
    code, out, err = command(capsys, "sweep", *options, "--json")
    assert code == 1
    results = json.loads(out)
    failed, finished = results["cells"]
    assert (failed["status"], finished["status"]) == ("failed", "finished")
    assert "usable updates" in failed["error"]
    assert "cell 1/2  failed: round 1: 0 usable updates" in err
    assert results["rows"][0]["test"] is None and results["best"] == 1
    (folder,) = (place / "sweeps").iterdir()
    assert (
        "- failed: learning_rate=1e30 seed=0: round 1: 0 usable"
        in (folder / "table.md").read_text()
    )
    assert "1 of 1 failed" in (folder / "sweep.html").read_text()
    # resumed, only that cell is tried again, in the run it had
    code, out, err = command(capsys, "sweep", "--resume", str(folder), "--json")
    assert code == 1 and "cell 2/2" not in err
    assert stable(json.loads(out)) == stable(results)
    assert len(list_runs(folder / "runs")) == 2


def test_an_interrupt_says_how_to_go_on(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    data: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "simulate", interrupted)
    code, out, err = command(capsys, "sweep", *sets(*TINY, *data))
    (folder,) = (place / "sweeps").iterdir()
    assert (code, out) == (130, "")
    assert f"continue with: fedgraft sweep --resume sweeps/{folder.name}\n" in err


def test_it_does_not_go_on_with_other_data(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = write_digits(place / "own", 40, 20)
    axes = read_axes((*TINY, *own, RATES))
    cells = make_cells(cli.DEMO, axes, None)
    inputs = sweep.check_cells(cells, Console(quiet=True))
    begun = sweep.Sweep.create(place, axes, cells, [inputs[cell.number] for cell in cells])
    assert begun.cells == cells
    write_digits(place / "own", 44, 20)
    code, _, err = command(capsys, "sweep", "--resume", str(begun.folder), "-q")
    assert code == 1
    assert "its data changed" in err and "start a new sweep" in err
    assert list_runs(begun.folder / "runs") == []


@pytest.mark.parametrize(
    ("arguments", "what", "hint"),
    [
        (sets("rounds.min_sites=1,3"), "cell min_sites=3 seed=0: ", "lower rounds.min_sites"),
        (sets("simulation.train=DATA,nowhere"), "cell train=", ""),
        (sets("method.targets=all-linear,[\"nothing\"]"), 'cell targets=["nothing"] seed=0: ', ""),
        (sets("training.epochs=1,2", "training.epochs=3"), "training.epochs is given twice", ""),
        (sets("training.epochs=1,"), "empty value", "comma"),
        (sets("training.epochs=1,1"), "the same job", "once"),
        (["--seeds", "0"], "--seeds 0", "--seeds 3"),
        ([*sets("job.seed=4"), "--seeds", "2"], "both job.seed and --seeds", "keep one"),
        (["--resume", "nowhere"], "a resumed sweep keeps its job and grid", "--resume alone"),
        (["--sweeps", "file/sweeps"], "cannot write a sweep", "--sweeps"),
        (["missing.toml"], "no file missing.toml", "fedgraft init"),
    ],
)  # fmt: skip
def test_bad_input_leaves_nothing(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    data: tuple[str, ...],
    arguments: Sequence[str],
    what: str,
    hint: str,
) -> None:
    (place / "file").write_text("")
    train = data[0].partition("=")[2]
    words = [word.replace("DATA", train) for word in arguments]
    given = {word.partition("=")[0] for word in words}
    rest = [one for one in (*TINY, *data) if one.partition("=")[0] not in given]
    code, out, err = command(capsys, "sweep", *words, *sets(*rest))
    assert code == 2, err
    assert "error:" in err and what in err and "hint:" in err and hint in err
    assert "Traceback" not in err and out == ""
    assert not (place / "sweeps").exists()


def test_only_the_folder_of_a_sweep_can_be_resumed(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = command(capsys, "sweep", "--resume", "nowhere")
    assert code == 2 and "nowhere is not the folder of a sweep" in err


@pytest.mark.slow
def test_ctrl_c_stops_the_command(place: Path, data: tuple[str, ...]) -> None:
    # A shell starts its background jobs with this signal ignored, and children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = start(*sets(*TINY, *data, "rounds.count=500"))
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for(process, place, "*/runs/*/checkpoints/round-*", 1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
