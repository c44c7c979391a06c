"""How deep below the head each trained tensor lies: blocks of a model, counted from the top.

A block is whatever stands in a numbered container of modules (``encoder.layer.3``, ``h.11``,
``stages.0``), the outermost where they are nested. What comes before the first block, such as
embeddings, is one more at the bottom; what comes after the last one is part of it.
"""

import re
from collections.abc import Iterable

from torch import nn

from fedgraft.common.backbones.load import head_names

__all__ = ["blocks_in", "depths"]

BLOCK = re.compile(r"(.*?\.\d+)(\.|$)")


def blocks_in(model: nn.Module) -> tuple[str, ...]:
    """Names of the blocks of a model of transformers in its own order, the lowest first."""
    return _blocks(_body(model, (name for name, _ in model.named_parameters())))


def depths(model: nn.Module, trained: Iterable[str]) -> tuple[int, ...]:
    """The depth of each tensor in ``trained``: 0 in the head, 1 in the last block, and so on.

    ``model`` is one of transformers with what peft put into it, and ``trained`` are names in it.
    """
    body = _body(model, (name for name, _ in model.named_parameters()))
    blocks = _blocks(body)
    at = {block: len(blocks) - place for place, block in enumerate(blocks)}
    first = next((place for place, name in enumerate(body) if _block_of(name)), 0)
    inside, below = set(body), set(body[:first])

    def depth(name: str) -> int:
        if name not in inside:
            return 0
        if block := _block_of(name):
            return at[block]
        return len(blocks) + 1 if name in below else 1

    return tuple(map(depth, trained))


def _body(model: nn.Module, names: Iterable[str]) -> list[str]:
    heads = tuple(f"{name}." for name in head_names(model))
    return [name for name in names if not (heads and name.startswith(heads))]


def _block_of(name: str) -> str | None:
    found = BLOCK.match(name)
    return found[1] if found else None


def _blocks(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(block for name in names if (block := _block_of(name))))
