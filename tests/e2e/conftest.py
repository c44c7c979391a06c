"""What the version before the wings did otherwise."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fedgraft.client.data.rows import SplitRows
from fedgraft.client.data.splits import Splits
from fedgraft.common.seeds import numpy_generator
from fedgraft.simulations.data.sources import labels_of, stratified_split


@pytest.fixture
def old_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold out the rows that the earlier version held out: a share of every label, by seed."""

    def held_out(splits: Splits, rows: SplitRows) -> NDArray[np.bool_]:
        draw = numpy_generator(splits.job.job.seed, "validation", splits.config.name)
        labels = labels_of(rows.dataset)
        _, held = stratified_split(labels, splits.job.data.validation, draw)
        return np.isin(np.arange(len(labels)), held)

    monkeypatch.setattr(Splits, "_held_out", held_out)
    monkeypatch.setenv("FEDGRAFT_CACHE", str(tmp_path / "cache"))  # no examples of another split
