"""The network that other tests break does what it says: tried with packets."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from e2e.netlab import Network, Wire, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

ECHO = """
import socket
socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
socket.bind(("", 9))
print("ready", flush=True)
while True:
    socket.sendto(*socket.recvfrom(2000))
"""
ASK = """
import socket, sys, time
host, count, wait = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
socket.connect((host, 9))
socket.settimeout(wait)
trips = []
for number in range(count):
    began = time.perf_counter()
    try:
        socket.send(bytes(1000))
        socket.recv(2000)
    except OSError:
        continue
    trips.append(time.perf_counter() - began)
print(len(trips), min(trips, default=0.0))
"""


@contextmanager
def echoing(network: Network, party: str) -> Iterator[None]:
    command = [*network.inside(party), sys.executable, "-c", ECHO]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        try:
            yield
        finally:
            process.kill()


def ask(network: Network, party: str, count: int, wait: float = 0.3) -> tuple[int, float]:
    """How many of ``count`` packets came back, and the quickest round trip in seconds."""
    command = [*network.inside("here"), sys.executable, "-c", ASK, network.address(party)]
    done = subprocess.run([*command, str(count), str(wait)], capture_output=True, check=True)
    came, quickest = done.stdout.split()
    return int(came), float(quickest)


def test_parties_are_far_lose_frames_and_are_cut_off_as_asked() -> None:
    far, lossy = Wire(delay=0.05), Wire(loss=0.3)
    with Network(["here", "near", "far", "lossy"], slow={"far": far, "lossy": lossy}) as network:
        with echoing(network, "near"):
            came, quickest = ask(network, "near", 5)
            assert came == 5 and quickest < 0.05
            network.cut("near")
            assert ask(network, "near", 2, 0.1)[0] == 0
            network.heal("near")
            assert ask(network, "near", 5)[0] > 0
        with echoing(network, "far"):
            came, quickest = ask(network, "far", 5)
            assert came > 0 and 0.1 <= quickest < 0.2
        with echoing(network, "lossy"):
            # Until its address is known: what resolves it is lost too, and tried once a second.
            assert any(ask(network, "lossy", 1, 0.5)[0] for _ in range(20))
            came, _ = ask(network, "lossy", 40, 0.02)
            assert 5 <= came <= 35  # about half of 40
    assert why_not() == ""
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert network.inside("near")[-1] not in left.stdout


@pytest.mark.slow
def test_a_narrow_link_is_narrow() -> None:
    """What is more than the burst of 64 KB takes its time: 36 KB, at 12.5 KB a second."""
    with Network(["here", "near"]) as network, echoing(network, "near"):
        network.limit("near", 0.1)
        began = time.monotonic()
        ask(network, "near", 100, 0.5)
        assert time.monotonic() - began > 2.0
