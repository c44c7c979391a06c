"""Every test works offline and in a cache of its own."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: torch's threads would only wait

# How long an example takes says how busy the machine is, and nothing of the code: no deadline.
settings.register_profile("whole", deadline=None, max_examples=100)
settings.register_profile("quick", deadline=None, max_examples=25)


def pytest_configure(config: pytest.Config) -> None:
    """Hypothesis tries fewer examples where slow tests are left out."""
    if settings.get_current_profile_name() != "mutation":  # which is tests/secagg/mutation.py's
        settings.load_profile("quick" if config.option.markexpr else "whole")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Whatever the test before it set, which is the number of threads of the whole process."""
    if torch := sys.modules.get("torch"):  # who does not need it shall not wait for it
        torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("FEDGRAFT_CACHE")
    os.environ["FEDGRAFT_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["FEDGRAFT_CACHE"]
    else:
        os.environ["FEDGRAFT_CACHE"] = before
