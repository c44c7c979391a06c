"""The benchmark of secure aggregation measures what it says, on a round small enough for a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "simulations" / "benchmarks" / "secagg.py"
TINY = ("--sites", "5", "--parameters", "1000", "--dropout", "0.2", "--passes", "1", "--json")
PEER = """
import json, sys
assert sys.argv[1:] == ["5", "1000", "0.2"]
client, server = {"setup": 1.0, "mask": 2.0}, {"setup": 4.0, "unmask": 5.0}
sent = {"collect_masked_vectors": 8.0}
told = {"client_mean_s": client, "server_s": server, "up_bytes_per_param": sent, "errs": ["why"]}
print(json.dumps(told | {"completed": COMPLETED}))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def write_peer(folder: Path, *, completed: bool) -> Path:
    script = folder / "peer.py"
    script.write_text(PEER.replace("COMPLETED", str(completed)), encoding="utf-8")
    return script


def test_a_tiny_round_gives_every_figure() -> None:
    done = run(*TINY)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["sites"], result["parameters"], result["threads"]) == (5, 1000, 1)
    assert (result["dropout"], result["dropped"]) == (0.2, 1)
    assert result["exact"] is True
    assert result["bytes_per_parameter"] == (8 * 4 + 1000 * 3) / 1000  # 24 bits up to 128 sites
    # a seed for each of 4 survivors, and the mask that each of them shares with the dropout
    assert result["masks_removed"] == 4 + 4
    client = {"advertise", "share", "accept", "mask", "confirm", "unmask"}
    assert set(result["client_stages"]) == client
    coordinator = {"keys", "shares", "adding", "confirm", "unmasking", "mean"}
    assert set(result["coordinator_stages"]) == coordinator
    for role in ("client", "coordinator"):
        total = sum(result[f"{role}_stages"].values())
        assert result[f"{role}_cpu_s"] == pytest.approx(total) and total > 0
        assert result[f"flower_{role}_cpu_s"] is None
        assert result[f"{role}_cpu_ratio"] is None
    assert result["flower_bytes_per_parameter"] is None
    assert result["coordinator_peak_bytes"] > 4 * 1000 + result["upload_bytes"]
    assert result["coordinator_peak_over_4d"] == result["coordinator_peak_bytes"] / 4000
    assert 0 < result["share_of_aes_rate"] < 1


def test_the_peer_is_asked_for_the_same_round(tmp_path: Path) -> None:
    done = run(*TINY, "--peer", str(write_peer(tmp_path, completed=True)))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["flower_client_cpu_s"] == 3.0
    assert result["flower_coordinator_cpu_s"] == 9.0
    assert result["client_cpu_ratio"] == 3.0 / result["client_cpu_s"]
    assert result["coordinator_cpu_ratio"] == 9.0 / result["coordinator_cpu_s"]
    assert result["flower_bytes_per_parameter"] == 8.0


def test_a_peer_that_fails_is_no_result(tmp_path: Path) -> None:
    done = run(*TINY, "--peer", str(write_peer(tmp_path, completed=False)))
    assert done.returncode == 1 and done.stdout == ""
    assert "why" in done.stderr and "hint:" in done.stderr


@pytest.mark.parametrize(
    "option",
    [
        ("--dropout", "1"),
        ("--dropout", "0.9"),  # more than the signatures can stand
        ("--sites", "2"),
        ("--threads", "0"),
        ("--peer", "nowhere.py"),
        ("--plot", "cost.png"),  # nothing to draw
    ],
)
def test_a_bad_option_is_refused_with_a_hint(option: tuple[str, str]) -> None:
    done = run(*TINY, *option)
    assert done.returncode == 2 and done.stdout == ""
    assert "error:" in done.stderr and "hint:" in done.stderr
