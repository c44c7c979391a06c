"""Flower as it ships, as the peer of ``deployment.py``: its SuperLink, SuperNodes and strategy.

A SuperLink and one SuperNode a site, each with the isolation that is its default, and Flower's own
FedAvg, which sends arrays as large as ours; a site sends them back as they came. Only training is
asked for, no evaluation, and nothing is encrypted: both speak for Flower.
"""

import itertools
import os
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedgraft.common.errors import FedgraftError

__all__ = ["Flower"]

PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "echo"
version = "1.0.0"
description = "Arrays to sites and back."
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedgraft"

[tool.flwr.app.components]
serverapp = "echo.server:app"
clientapp = "echo.client:app"

[tool.flwr.app.config]
times = ""
sites = 3
rounds = 3
values = 1000
"""
CLIENT = """\
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    content = RecordDict(
        {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})}
    )
    return Message(content, reply_to=message)
"""
SERVER = """\
import time

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class Timed(FedAvg):
    def __init__(self, path, **options):
        super().__init__(**options)
        self.path = path

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        failed = any(reply.has_error() for reply in replies)
        result = super().aggregate_train(server_round, replies)
        with open(self.path, "a") as file:
            file.write(f"{time.time()} {0 if failed else len(replies)}\\n")
        return result


@app.main()
def main(grid, context):
    config = context.run_config
    arrays = ArrayRecord({"adapter": Array(np.zeros(int(config["values"]), dtype=np.float32))})
    sites = int(config["sites"])
    strategy = Timed(
        config["times"], fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites
    )
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=int(config["rounds"]))
"""


class Flower:
    """A SuperLink on ``port`` and SuperNodes below ``folder``; make one with ``started``."""

    def __init__(self, folder: Path, port: int, sites: Sequence[int]) -> None:
        self.folder, self.port, self.sites = folder, port, sites
        scripts = sysconfig.get_path("scripts")
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")]),
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # there is no network
        }

    @contextmanager
    def started(self) -> Iterator[None]:
        """All processes, until the end of the context."""
        package = self.folder / "app" / "echo"
        package.mkdir(parents=True)
        (package.parent / "pyproject.toml").write_text(PROJECT)
        (package / "__init__.py").touch()
        (package / "client.py").write_text(CLIENT)
        (package / "server.py").write_text(SERVER)
        home = self.folder / "home"
        home.mkdir()
        address = f"127.0.0.1:{self.port}"
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{address}"\n'
            "insecure = true\n"
        )
        with ExitStack() as stack:
            link = ["flower-superlink", "--insecure", "--port", str(self.port)]
            self._start(stack, link, "superlink")
            for port in self.sites:
                node = ["flower-supernode", "--insecure", "--superlink", address]
                self._start(stack, [*node, "--port", str(port)], f"supernode-{port}")
            yield

    def rounds(self, count: int, values: int) -> list[float]:
        """Seconds between the ends of ``count`` rounds that follow a first one."""
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".times") as times:
            config = (
                f'times="{times.name}" sites={len(self.sites)} rounds={count + 1} values={values}'
            )
            command = ["flwr", "run", str(self.folder / "app"), "--run-config", config]
            with (self.folder / "run.log").open("ab") as log:
                subprocess.run(
                    command, env=self.environment, check=True, stdout=log, stderr=subprocess.STDOUT
                )
            stop = time.monotonic() + 60 * (count + 1)
            lines: list[list[str]] = []
            while len(lines) <= count:
                if time.monotonic() > stop:
                    raise FedgraftError("Flower's run does not end", hint=f"see {self.folder}")
                time.sleep(0.2)
                lines = [line.split() for line in Path(times.name).read_text().splitlines()]
        if any(int(replies) != len(self.sites) for _, replies in lines):
            raise FedgraftError("a site of Flower's failed", hint=f"see {self.folder}")
        ends = [float(end) for end, _ in lines]
        return [after - before for before, after in itertools.pairwise(ends)]

    def _start(self, stack: ExitStack, command: list[str], name: str) -> None:
        log = stack.enter_context((self.folder / f"{name}.log").open("ab"))
        process = subprocess.Popen(
            command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        stack.callback(process.wait)
        stack.callback(process.terminate)
