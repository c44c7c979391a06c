"""Programs that check what Python cannot: beside this Python or on PATH, or the test skips."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

BESIDE = str(Path(sys.executable).parent)  # where pip puts programs of a venv


def find(name: str, *, source: str) -> str:
    """Path of the program ``name``, or skip the test and say what it comes with."""
    path = os.pathsep.join([BESIDE, os.environ.get("PATH", ""), "/usr/sbin"])
    found = shutil.which(name, path=path)
    if found is None:
        pytest.skip(f"{name} is not here: it comes with {source}")
    return found


def run(
    command: Sequence[str | Path], *, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a checking program in ``cwd``; both outputs as text, nothing raised."""
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=120
    )


def passes(command: Sequence[str | Path], *, cwd: Path | None = None) -> str:
    """Output of a checking program that finds nothing wrong."""
    done = run(command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
