"""How fast a backbone reaches the sites, verified and stored, beside curl and the same nginx.

    python simulations/benchmarks/backbone.py
    python simulations/benchmarks/backbone.py --backbone DIR --gbit --json

Both come through one nginx over mutual TLS on one machine: curl fetches the files as they are, a
site fetches the backbone from our gRPC service behind ``grpc_pass``. They run alternately; a figure
is the median over ``--repeats`` of curl's seconds over ours, from the first connection to the last
byte on disk. Ours also hashes every byte and flushes it to the disk, curl does neither.

``coordinator_growth_mb`` is the peak memory of the service's process during all of it beyond what
it had before; ``redownloaded_chunks`` the most chunks that a site killed half-way had received, at
least in part, and fetches again. ``--gbit`` puts the sites behind 1 Gbit/s, in a network namespace
(needs root, ``ip`` and ``tc``).
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.backbone_front import make_certificates, start_nginx
from fedgraft.common.backbones.blob_store import BlobStore, Manifest, make_manifest
from fedgraft.common.console import Console, print_error
from fedgraft.common.errors import FedgraftError, InputError

GOALS = {
    "backbone_over_curl": ">= 0.4",
    "backbone_over_curl_4_sites": "",
    "backbone_over_curl_1gbit": ">= 0.95",
    "coordinator_growth_mb": "<= 64",
    "redownloaded_chunks": "<= 1",
}
RUN = [sys.executable, str(Path(__file__).parent / "backbone_run.py")]
PORT = 18443
SHARDS = 4
NAMESPACE = "fedgraft-bench"
NEAR, FAR = "10.231.77.1", "10.231.77.2"
KILLS = 3
Figures = dict[str, Any]


def make_model(folder: Path, megabytes: int) -> Path:
    """A folder with random weights in four files."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for shard in range(SHARDS):
        with (folder / f"model-{shard}.safetensors").open("wb") as file:
            for _ in range(megabytes // SHARDS):
                file.write(os.urandom(1_000_000))
    return folder


class Bench:
    """The coordinator behind nginx at ``host``, and what runs against it."""

    def __init__(self, work: Path, model: Path, manifest: Manifest, host: str) -> None:
        self.work, self.model, self.manifest, self.host = work, model, manifest, host
        self.prefix: tuple[str, ...] = ()

    @contextmanager
    def up(self) -> Iterator[None]:
        """Certificates, our service, nginx."""
        socket = self.work / "backbones.sock"
        make_certificates(self.work / "tls", self.host)
        command = [*RUN, "serve", str(self.work / "store"), str(socket)]
        with ExitStack() as stack:
            self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.callback(self.server.wait)
            stack.callback(self.server.kill)
            if not self.server.stdout or not self.server.stdout.readline():
                raise FedgraftError("the service did not start", hint="is the port free?")
            nginx = start_nginx(
                self.work / "nginx",
                f"{self.host}:{PORT}",
                tls=self.work / "tls",
                files=self.model,
                socket=socket,
            )
            stack.callback(nginx.wait)
            stack.callback(nginx.terminate)
            yield

    def curl(self, sites: int) -> float:
        """Seconds until so many curls have every file."""
        tls = self.work / "tls"
        with self._folders(sites) as folders:
            started = time.perf_counter()
            running = []
            for folder in folders:
                command = [*self.prefix, "curl", "-sSf", "--cacert", str(tls / "ca.pem")]
                command += ["--cert", str(tls / "site.pem"), "--key", str(tls / "site.key")]
                for file in self.manifest.files:
                    command += ["-o", str(folder / file.name)]
                    command += [f"https://{self.host}:{PORT}/files/{file.name}"]
                running.append(subprocess.Popen(command))
            if any([process.wait() for process in running]):
                raise FedgraftError("curl failed", hint=f"see {self.work / 'nginx/error.log'}")
            return time.perf_counter() - started

    def fetch(self, sites: int) -> float:
        """Seconds until so many sites have the backbone."""
        with self._folders(sites) as folders:
            running = [self.site(folder) for folder in folders]
            started = time.perf_counter()
            for process in running:
                process.communicate(b"go\n")
            if any(process.returncode for process in running):
                raise FedgraftError("a site failed", hint="what it says is above")
            return time.perf_counter() - started

    def site(self, folder: Path) -> "subprocess.Popen[bytes]":
        """A site that waits for a line and then fetches into ``folder``."""
        ends = [f"{self.host}:{PORT}", str(self.work / "tls"), self.manifest.digest, str(folder)]
        command = [*self.prefix, *RUN, "fetch", *ends]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if not process.stdout or not process.stdout.readline():
            raise FedgraftError("a site did not start", hint="what it says is above")
        return process

    @contextmanager
    def _folders(self, sites: int) -> Iterator[list[Path]]:
        folders = [self.work / f"site-{number}" for number in range(sites)]
        for folder in folders:
            folder.mkdir()
        yield folders
        for folder in folders:
            shutil.rmtree(folder)


def compare(bench: Bench, sites: int, repeats: int, console: Console) -> Figures:
    """Both, alternately."""
    curl, ours = [], []
    name = f"{sites} sites" if sites > 1 else "1 site"
    with console.steps(name, repeats) as steps:
        for _ in range(repeats):
            curl.append(bench.curl(sites))
            ours.append(bench.fetch(sites))
            steps.done(f"curl {curl[-1]:.2f} s, ours {ours[-1]:.2f} s")
    return {
        "curl_s": curl,
        "ours_s": ours,
        "ratio": statistics.median(c / o for c, o in zip(curl, ours, strict=True)),
        "ours_mb_per_s": bench.manifest.size * sites / 1e6 / statistics.median(ours),
    }


def kill(bench: Bench, after: float) -> int:
    """Kill a site after so many seconds; how many chunks had begun to come and are lost."""
    folder = bench.work / "killed"
    process = bench.site(folder)
    if process.stdin:
        process.stdin.write(b"go\n")
        process.stdin.flush()
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    store = BlobStore(folder)
    missing = store.missing(bench.manifest)
    again = sum(_has_come(store, bench.manifest, index) for index in missing)
    second = bench.site(folder)
    said = json.loads(second.communicate(b"go\n")[0])
    if said["chunks"] != len(missing) or not store.complete(bench.manifest):
        raise FedgraftError("a site that was killed did not go on", hint="this is a fault")
    shutil.rmtree(folder)
    return again


def _has_come(store: BlobStore, manifest: Manifest, index: int) -> bool:
    """Whether any byte of a chunk that is missing was written: the file is a hole otherwise."""
    chunk = manifest.chunks[index]
    path = store.root / "partial" / chunk.file.content
    if not path.exists():
        return False
    with path.open("rb") as file:
        try:
            data = os.lseek(file.fileno(), chunk.offset, os.SEEK_DATA)
        except OSError:
            return False
    return data < chunk.offset + chunk.length


@contextmanager
def gigabit() -> Iterator[tuple[str, ...]]:
    """A network namespace behind 1 Gbit/s; what to put before a command to run it there."""
    inside = ("ip", "netns", "exec", NAMESPACE)
    shape = ("root", "tbf", "rate", "1gbit", "burst", "256kb", "latency", "20ms")
    try:
        for command in (
            ("ip", "netns", "add", NAMESPACE),
            ("ip", "link", "add", "fgb0", "type", "veth", "peer", "fgb1", "netns", NAMESPACE),
            ("ip", "addr", "add", f"{NEAR}/30", "dev", "fgb0"),
            ("ip", "link", "set", "fgb0", "up"),
            (*inside, "ip", "addr", "add", f"{FAR}/30", "dev", "fgb1"),
            (*inside, "ip", "link", "set", "fgb1", "up"),
            ("tc", "qdisc", "add", "dev", "fgb0", *shape),
            (*inside, "tc", "qdisc", "add", "dev", "fgb1", *shape),
        ):
            _call(command)
        yield inside
    finally:
        subprocess.run(["ip", "netns", "del", NAMESPACE], stderr=subprocess.DEVNULL)


def _call(command: Sequence[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise FedgraftError(
            f"{' '.join(command)} failed", hint=f"--gbit needs root, ip and tc ({error})"
        ) from None


def measure(options: argparse.Namespace, console: Console, work: Path) -> Figures:
    """Everything the options ask for."""
    model = options.backbone or make_model(work / "model", options.megabytes)
    manifest = make_manifest(model, source="benchmark")
    BlobStore(work / "store").import_folder(model, manifest)
    bench = Bench(work, model.resolve(), manifest, "127.0.0.1")
    with bench.up():
        process = psutil.Process(bench.server.pid)
        bench.curl(1)  # fills the page cache
        before = process.memory_info().rss
        one = compare(bench, 1, options.repeats, console)
        four = compare(bench, 4, options.repeats, console)
        growth = _peak(process.pid) - before
        moments = [statistics.median(one["ours_s"]) * at / KILLS for at in range(1, KILLS)]
        again = max(kill(bench, moment) for moment in moments)
    result: Figures = {
        "backbone_over_curl": one["ratio"],
        "backbone_over_curl_4_sites": four["ratio"],
        "coordinator_growth_mb": growth / 1e6,
        "redownloaded_chunks": again,
        "megabytes": manifest.size / 1e6,
        "runs": {"1": one, "4": four},
    }
    if options.gbit:
        slow = _behind_gigabit(options, console, bench)
        result |= {"backbone_over_curl_1gbit": slow["ratio"], "runs_1gbit": slow}
    return result


def _behind_gigabit(options: argparse.Namespace, console: Console, bench: Bench) -> Figures:
    for used in ("tls", "nginx"):
        shutil.rmtree(bench.work / used)
    with gigabit() as inside:
        bench.host, bench.prefix = NEAR, inside
        with bench.up():
            return compare(bench, 1, options.repeats, console)


def _peak(pid: int) -> int:
    """Bytes of memory a process had at most (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def show(result: Figures, console: Console) -> None:
    """One table."""
    rows = [[name, f"{result[name]:.3g}", goal] for name, goal in GOALS.items() if name in result]
    console.table("A backbone to the sites, beside curl", ["figure", "measured", "goal"], rows)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbone", type=Path, help="a model's folder; random weights if absent")
    parser.add_argument("--megabytes", type=int, default=1000, help="of random weights")
    parser.add_argument("--repeats", type=int, default=3, help="of each")
    parser.add_argument(
        "--work", type=Path, help="folder for everything; a temporary one if absent"
    )
    parser.add_argument("--gbit", action="store_true", help="also behind 1 Gbit/s")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser.parse_args()


def main() -> int:
    """Measure and print; 0, 1 where a run failed, 2 for a bad option."""
    options = read_options()
    console = Console(as_json=options.json)
    try:
        for needed in ("nginx", "curl"):
            if shutil.which(needed) is None:
                raise InputError(f"no {needed} here", hint=f"install it: apt install {needed}")
        if options.backbone and not options.backbone.is_dir():
            raise InputError(f"no folder {options.backbone}", hint="give the path of a model")
        with tempfile.TemporaryDirectory(dir=options.work) as name:
            result = measure(options, console, Path(name))
    except FedgraftError as error:
        print_error(error)
        return error.exit_code
    show(result, console)
    console.json({**result, "load": os.getloadavg()[0]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
