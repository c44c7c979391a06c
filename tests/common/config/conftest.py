"""A job file to write over."""

from pathlib import Path

import pytest
from support.job_files import MINIMAL


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A valid job file in a folder of its own."""
    path = tmp_path / "jobs" / "job.toml"
    path.parent.mkdir()
    path.write_text(MINIMAL, encoding="utf-8")
    return path
