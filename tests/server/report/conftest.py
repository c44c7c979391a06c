"""Pages of which only the words are tried."""

import pytest


@pytest.fixture
def words_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no figure: each takes a fifth of a second."""
    monkeypatch.setattr("fedgraft.server.report.plots.render", lambda *_: "<svg></svg>")
