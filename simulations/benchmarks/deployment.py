"""Seconds of a round between organisations, beside Flower as it ships, and what idling costs.

    python simulations/benchmarks/deployment.py
    python simulations/benchmarks/deployment.py --json

Three sites on this machine, as processes, with next to nothing to compute. Ours is the whole
product: `fedgraft coordinator run` with nginx and mutual TLS, `fedgraft site run` with policy and
audit; a round trains, aggregates, validates and is committed to disk. The peer
(``deployment_flower.py``) is Flower's own SuperLink, SuperNodes and FedAvg without TLS, whose sites
send back what they got. They run alternately. A figure is the median time between the ends of two
rounds, after a first one that warms up; masked also without validation, which is masked too.

The figures of the backbone are those of ``backbone.py``, run here with its defaults.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

# The federation of processes is the one that the tests drive.
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import itertools

from e2e.partners import NGINX, Partners
from e2e.superlink import free_ports
from support.federations import digits_job, write_digits

from benchmarks.backbone import measure as measure_backbone
from benchmarks.deployment_flower import Flower
from fedgraft.common.console import Console, print_error
from fedgraft.common.errors import FedgraftError, InputError

GOALS = {
    "round_seconds": "<= 0.5",
    "flower_round_seconds": "",
    "secure_round_seconds": "<= 2",
    "secure_training_seconds": "",
    "idle_requests_per_3_s": "<= 1",
    "idle_cpu_percent": "< 1",
    "backbone_over_curl": ">= 0.4",
    "backbone_over_curl_4_sites": ">= 0.4",
    "backbone_over_curl_1gbit": ">= 0.95",
    "coordinator_growth_mb": "<= 64",
    "redownloaded_chunks": "<= 1",
}
SITES = 3
MASKED = "privacy.secure_aggregation.enabled=true"
UNVALIDATED = "rounds.evaluate_every=100"  # more rounds than are run: five masked stages, not ten
IDLE_AFTER = 20.0  # seconds; sites ask briskly for as long after a message
Figures = dict[str, Any]


def our_rounds(partners: Partners, count: int, *overrides: str) -> tuple[list[float], int]:
    """Seconds between the ends of ``count`` rounds after a first one; bytes of one update."""
    options = (f"rounds.count={count + 1}", "rounds.min_sites=3", "rounds.deadline='60s'")
    job = digits_job(*write_digits(partners.folder / "digits", 60, 30), *options, *overrides)
    run = partners.submit(job)
    path = partners.home / "runs" / run / "metrics.jsonl"
    ends: list[float] = []
    stop = time.monotonic() + 60 + 30 * count
    while len(ends) <= count:
        if time.monotonic() > stop:
            raise FedgraftError("a run does not end", hint=f"see {partners.folder}")
        time.sleep(0.005)
        if path.exists() and path.read_bytes().count(b"\n") > len(ends):
            ends.append(time.monotonic())
    partners.until(lambda: partners.state(run) == "finished", 60)
    history = partners.rounds(run)
    if any(line["sites"] != SITES for line in history):
        raise FedgraftError("a site was missing in a round", hint=f"see {partners.folder}")
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    return seconds, history[-1]["bytes_up"] // SITES


def idle(partners: Partners, seconds: float) -> Figures:
    """What a site without work asks of the coordinator and of its own machine."""
    time.sleep(IDLE_AFTER)
    configuration = partners.home / "nginx" / "nginx.conf"
    text = configuration.read_text()
    configuration.write_text(text.replace("refused if=$is_refused", "refused"))  # log everything
    log = partners.home / "nginx" / "refused.log"
    _reload(partners)
    sites = [psutil.Process(partners.pid(name)) for name in sorted(partners.data)]
    before, lines = [_cpu(site) for site in sites], log.read_bytes().count(b"\n")
    time.sleep(seconds)
    used = [_cpu(site) - was for site, was in zip(sites, before, strict=True)]
    requests = (log.read_bytes().count(b"\n") - lines) / len(sites)
    configuration.write_text(text)
    _reload(partners)
    return {
        "idle_requests_per_3_s": 3 * requests / seconds,
        "idle_cpu_percent": 100 * statistics.mean(used) / seconds,
    }


def _reload(partners: Partners) -> None:
    os.kill(int((partners.home / "nginx" / "nginx.pid").read_text()), 1)  # SIGHUP
    time.sleep(1)


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def measure_rounds(options: argparse.Namespace, console: Console, work: Path) -> Figures:
    """Rounds of ours, of Flower, and masked ones of ours, alternately; then idling."""
    port, *nodes = free_ports(1 + SITES)
    flower = Flower(work / "flower", port, nodes)
    flower.folder.mkdir()
    job = digits_job(*write_digits(work / "digits", 60, 30), f"simulation.sites={SITES}")
    clear: list[float] = []
    peer: list[float] = []
    secure: list[float] = []
    training: list[float] = []
    with Partners(work / "p", job) as partners, flower.started():
        partners.join_all()
        partners.start_sites()
        with console.steps("rounds", options.repeats) as steps:
            for _ in range(options.repeats):
                seconds, size = our_rounds(partners, options.rounds)
                clear += seconds
                peer += flower.rounds(options.rounds, size // 4)
                secure += our_rounds(partners, options.rounds, MASKED)[0]
                training += our_rounds(partners, options.rounds, MASKED, UNVALIDATED)[0]
                steps.done(f"{clear[-1]:.2f} s, Flower {peer[-1]:.2f} s, masked {secure[-1]:.2f} s")
        resting = idle(partners, options.idle)
    taken = {
        "round_seconds": clear,
        "flower_round_seconds": peer,
        "secure_round_seconds": secure,
        "secure_training_seconds": training,
    }
    return {
        **{name: statistics.median(seconds) for name, seconds in taken.items()},
        **resting,
        "update_bytes": size,
        "rounds": taken,
    }


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8, help="of each, after the first")
    parser.add_argument("--repeats", type=int, default=2, help="of each")
    parser.add_argument("--idle", type=float, default=60.0, help="seconds of watching idle sites")
    parser.add_argument("--no-backbone", action="store_true", help="only rounds and idling")
    parser.add_argument("--no-rounds", action="store_true", help="only the backbone")
    parser.add_argument("--backbone", type=Path, help="a model's folder; random weights if absent")
    parser.add_argument("--megabytes", type=int, default=1000, help="of random weights")
    parser.add_argument("--work", type=Path, help="folder for the backbone's files")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args()
    options.gbit = os.geteuid() == 0  # network namespaces
    return options


def measure(options: argparse.Namespace, console: Console) -> Figures:
    """All that the options ask for."""
    result: Figures = {}
    if not options.no_rounds:
        # Short: it holds sockets.
        with tempfile.TemporaryDirectory(prefix="fg") as name:
            result |= measure_rounds(options, console, Path(name))
    if not options.no_backbone:
        with tempfile.TemporaryDirectory(dir=options.work) as name:
            result |= measure_backbone(options, console, Path(name))
    return result


def main() -> int:
    """Measure and print; 0, 1 where a run failed, 2 for a bad option."""
    options = read_options()
    console = Console(as_json=options.json)
    try:
        if NGINX is None:
            raise InputError("no nginx here", hint="install it: apt install nginx-light")
        result = measure(options, console)
    except FedgraftError as error:
        print_error(error)
        return error.exit_code
    except (subprocess.CalledProcessError, TimeoutError) as error:
        print("\n".join([str(error), *getattr(error, "__notes__", [])]), file=sys.stderr)
        return 1
    rows = [[name, f"{result[name]:.3g}", goal] for name, goal in GOALS.items() if name in result]
    console.table("Between organisations", ["figure", "measured", "goal"], rows)
    console.json({**result, "load": os.getloadavg()[0]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
