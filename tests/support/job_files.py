"""A small job file, changed or overridden, and why it is refused."""

from pathlib import Path

import pytest

from fedgraft.common.config.jobfile import load_job
from fedgraft.common.config.simulation import Simulation
from fedgraft.common.errors import JobError

__all__ = ["MINIMAL", "refused", "simulation", "write"]


MINIMAL = """\
[job]
name = "tiny"
task = "text-classification"
labels = ["yes", "no"]
[backbone]
source = "builtin:glyph-vit"
[method]
kind = "lora"
head = "shared"
[simulation]
train = "train.jsonl"
sites = 4
"""


def write(path: Path, old: str, new: str) -> Path:
    """Replace ``old`` in the job file."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


def refused(path: Path, *overrides: str) -> JobError:
    with pytest.raises(JobError) as caught:
        load_job(path, overrides)
    return caught.value


def simulation(path: Path, *overrides: str) -> Simulation:
    section = load_job(path, overrides).simulation
    assert section is not None
    return section
