"""The one backbone that a process holds, and what was made of it.

A process serves many jobs, one after the other. A backbone is larger than everything else, so only
one stays: opening another releases the one before. Workbenches of one backbone share its frozen
tensors. A backbone counts as the same while its files are the same, not while its path is.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

from fedgraft.common.backbones.folder import watched_files
from fedgraft.common.backbones.load import Backbone, find_backbone, locate
from fedgraft.common.errors import BackboneError
from fedgraft.common.witness import Witness

__all__ = ["Resident", "close_backbone", "open_apart", "resident"]

KEPT = 3  # workbenches: a federation, its head-only baseline, and one more


@dataclass
class Resident:
    """A backbone; ``processors`` by modality, ``benches`` by what shapes them.

    ``made`` is what was made of a workbench, such as a stack: it is kept as long as the workbench.
    ``frozen`` are the tensors of the folder, by name, as long as a workbench uses them.
    """

    backbone: Backbone
    witness: Witness
    processors: dict[str, Any] = field(default_factory=dict)
    benches: OrderedDict[str, Any] = field(default_factory=OrderedDict)
    made: dict[str, dict[str, Any]] = field(default_factory=dict)
    frozen: WeakValueDictionary[str, nn.Parameter] = field(default_factory=WeakValueDictionary)

    def check(self) -> None:
        """Check that the files are still those of ``backbone``, after something was read of them.

        Raises:
            BackboneError: they are not; nothing that was read may be kept.
        """
        if not self.witness.holds():
            raise BackboneError(
                f"{self.backbone.source}: its files changed while they were read",
                hint="wait until the copy is complete, and run this again",
            )

    def keep(self, shaping: str, bench: Any) -> None:
        """Keep ``bench`` under ``shaping``, and drop the one used longest ago if there are many."""
        self.benches[shaping] = bench
        while len(self.benches) > KEPT:
            oldest, _ = self.benches.popitem(last=False)
            self.made.pop(oldest, None)

    def share(self, model: nn.Module, names: dict[int, str]) -> None:
        """Put the tensors of an earlier workbench in the place of equal ones in ``model``.

        ``names`` has the name of each parameter that is as it is in the folder, by its ``id``. A
        parameter that trains stays the model's own.
        """
        for module in model.modules():
            for key, parameter in module._parameters.items():
                name = names.get(id(parameter))
                if parameter is None or name is None or parameter.requires_grad:
                    continue
                held = self.frozen.setdefault(name, parameter)
                if held.shape == parameter.shape and held.dtype == parameter.dtype:
                    module._parameters[key] = held


_held: dict[tuple[str, str], Resident] = {}


def resident(source: str, weights: str) -> Resident:
    """Return the backbone of this source; it is opened anew if its files are other ones now.

    Raises:
        BackboneError: as ``find_backbone``.
    """
    held = _held.get((source, weights))
    if held is None or not held.witness.holds():
        close_backbone()
        held = _held[source, weights] = open_apart(source, weights)
    return held


def open_apart(source: str, weights: str = "pretrained") -> Resident:
    """Return a backbone that this process does not hold, such as a teacher.

    Raises:
        BackboneError: as ``find_backbone``.
    """
    # The files are looked at before they are read: whatever changes later is noticed.
    witness = Witness(watched_files(locate(source)))
    return Resident(find_backbone(source, weights=weights), witness)


def close_backbone() -> None:
    """Drop the backbone and all that was made of it; code that still uses a part keeps that."""
    _held.clear()
