"""A job on a few real digits with the built-in backbone, for rules and methods."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.contract import Federation
from support.contract_refusals import merged
from support.federations import write_digits

from fedgraft.common.backbones.load import BUILTIN
from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.simulations.demo import digits

__all__ = ["BACKBONE", "DigitsCase"]

BACKBONE = BUILTIN / "glyph-vit"


class DigitsCase:
    """Digits below ``folder`` at two sites, with settings ``over`` those of a plain job."""

    def __init__(self, folder: Path, over: Mapping[str, Any]) -> None:
        self.folder = folder
        write_digits(folder / "digits", 45, 12)
        self._raw = merged(_raw(folder / "digits"), over)
        self.job = self.ask({})
        self.federation = Federation(self.job, folder / "runs")

    def ask(self, over: Mapping[str, Any]) -> Job:
        """The job with other settings.

        Raises:
            JobError: it is refused.
        """
        return parse_job(merged(self._raw, over), where="test")


def _raw(folder: Path) -> dict[str, Any]:
    return {
        "job": {"name": "t", "task": "image-classification", "labels": list(digits.NAMES)},
        "backbone": {"source": f"builtin:{BACKBONE.name}"},
        "method": {"kind": "lora", "rank": 2, "targets": ["q_proj", "fc1"], "head": "shared"},
        "training": {"batch_size": 8, "learning_rate": 3e-3},
        "rounds": {"count": 2, "evaluate_every": 2},
        "data": {"validation": 0.2, "normalize": "per-image"},
        "simulation": {
            "train": str(folder / "train"), "test": str(folder / "test"), "sites": 2,
            "partition": {"kind": "iid"}, "workers": 0, "sites_per_pass": 1, "device": "cpu",
        },
    }  # fmt: skip
