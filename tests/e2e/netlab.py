"""A network for tests to break: a namespace for each party, all on one bridge.

    with Network(["coordinator", "site-00", "site-01"], slow={"site-01": Wire(delay=0.1)}) as net:
        subprocess.Popen([*net.inside("site-01"), ...])
        net.cut("site-01")
        net.heal("site-01")

A party is linked to the bridge by a veth pair. Delay and loss are not left to the kernel, many of
which have no netem: such a party is linked by two TAPs, and a process of ours carries the frames.
"""

import ctypes
import fcntl
import heapq
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType, TracebackType
from typing import Self

__all__ = ["Network", "Wire", "why_not"]

SUBNET = "10.77.0"
FRAME = 65536
# linux/if_tun.h, linux/prctl.h
TUN, TUNSETIFF, IFF_TAP, IFF_NO_PI = "/dev/net/tun", 0x400454CA, 0x0002, 0x1000
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Wire:
    """A link that is slow (seconds, each way) and loses frames (share, each way)."""

    delay: float = 0.0
    loss: float = 0.0


NONE: Mapping[str, Wire] = MappingProxyType({})


@cache
def why_not() -> str:
    """Why there can be no network namespaces here; empty if there can."""
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "ip and tc (iproute2) are not installed"
    name = f"fg{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode:
        return "network namespaces are not permitted here"
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return "" if os.access(TUN, os.R_OK | os.W_OK) else f"{TUN} cannot be opened"


class Network:
    """Namespaces for ``parties`` on one bridge; all is gone after it.

    ``slow`` says whose links are; an address stays what it is while a party is cut off.
    """

    def __init__(self, parties: Sequence[str], *, slow: Mapping[str, Wire] = NONE) -> None:
        self._prefix = f"fg{os.getpid()}"
        self._ports = {party: f"p{number}" for number, party in enumerate(parties)}
        self._slow = dict(slow)
        self._wires: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            _ip("netns", "add", self._hub)
            _ip("-n", self._hub, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._hub, "link", "set", "bridge", "up")
            for party in self._ports:
                self._plug(party)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take everything down; what runs in a namespace must have ended before."""
        for wire in self._wires:
            wire.kill()
            wire.wait()
        for space in (*map(self._space, self._ports), self._hub):
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)

    def address(self, party: str) -> str:
        """The party's IPv4 address."""
        return f"{SUBNET}.{10 + list(self._ports).index(party)}"

    def inside(self, party: str) -> list[str]:
        """What a command begins with to run in the party's namespace."""
        return ["ip", "netns", "exec", self._space(party)]

    def cut(self, party: str) -> None:
        """Cut the party off; its own interface stays up, as when a cable far away is pulled."""
        _ip("-n", self._hub, "link", "set", self._ports[party], "down")

    def heal(self, party: str) -> None:
        """Connect the party again."""
        _ip("-n", self._hub, "link", "set", self._ports[party], "up")

    def limit(self, party: str, megabits: float) -> None:
        """Have no more than ``megabits`` a second go to the party, and none more come from it."""
        for space, port in ((self._hub, self._ports[party]), (self._space(party), "eth0")):
            shaper = ("tbf", "rate", f"{megabits}mbit", "burst", "64kb", "latency", "100ms")
            command = ["tc", "-n", space, "qdisc", "replace", "dev", port, "root", *shaper]
            subprocess.run(command, capture_output=True, check=True)

    @property
    def _hub(self) -> str:
        return f"{self._prefix}-hub"

    def _space(self, party: str) -> str:
        return f"{self._prefix}-{party}"

    def _plug(self, party: str) -> None:
        """Make the party's namespace and link it to the bridge."""
        space, port = self._space(party), self._ports[party]
        _ip("netns", "add", space)
        if party in self._slow:
            self._wires.append(_start_wire(self._hub, port, space, self._slow[party]))
        else:
            pair = ("peer", "name", port, "netns", self._hub)
            _ip("link", "add", "eth0", "netns", space, "type", "veth", *pair)
        _ip("-n", self._hub, "link", "set", port, "master", "bridge", "up")
        _ip("-n", space, "addr", "add", f"{self.address(party)}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            _ip("-n", space, "link", "set", link, "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, check=True)


def _start_wire(hub: str, port: str, space: str, wire: Wire) -> subprocess.Popen[bytes]:
    """Start a process that carries frames between ``port`` of ``hub`` and ``eth0`` of ``space``."""
    command = [sys.executable, __file__, hub, port, space, str(wire.delay), str(wire.loss)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    if process.stdout.readline() != b"ready\n":
        process.kill()
        raise OSError("no TAP could be made")
    return process


# What follows runs in a process of its own, one a wire.


def _carry(ends: tuple[int, int], wire: Wire) -> None:
    """Carry frames from each end to the other: after ``delay``, but for those that are lost."""
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    under_way: list[tuple[float, int, int, bytes]] = []
    draw, number = random.Random(0), 0
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        ready, _, _ = select.select(ends, [], [], wait)
        for end in ready:
            frame = os.read(end, FRAME)
            if draw.random() >= wire.loss:
                number += 1  # those of one moment stay in order
                due = time.monotonic() + wire.delay
                heapq.heappush(under_way, (due, number, other[end], frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, end, frame = heapq.heappop(under_way)
            with suppress(OSError):  # the interface is down
                os.write(end, frame)


def _open_tap(space: str, name: str) -> int:
    """A TAP that is ``name`` in the namespace ``space``; the file of its frames."""
    descriptor = os.open(TUN, os.O_RDWR)
    here = f"fgt{os.getpid()}"
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH", here.encode(), IFF_TAP | IFF_NO_PI))
    _ip("link", "set", here, "netns", space, "name", name)
    return descriptor


def _main(hub: str, port: str, space: str, delay: str, loss: str) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    ends = (_open_tap(hub, port), _open_tap(space, "eth0"))
    print("ready", flush=True)
    _carry(ends, Wire(float(delay), float(loss)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
