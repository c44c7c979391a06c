"""A healthy site and the coordinator that it asks."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.clinic import Authority, Coordinator, Site


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return Coordinator(tmp_path / "store")


@pytest.fixture
def site(tmp_path: Path, authority: Authority, coordinator: Coordinator) -> Iterator[Site]:
    with coordinator.serve(authority) as port:
        yield Site(tmp_path / "site", authority, f"localhost:{port}")
