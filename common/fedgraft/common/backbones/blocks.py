"""The depth of each trained tensor below the head: blocks of a model, counted from the top.

A block is a module in a numbered container (``encoder.layer.3``, ``h.11``, ``stages.0``); if
containers are nested, the outermost one counts. Modules before the first block, such as embeddings,
form one more block at the bottom. Modules after the last block are part of it.
"""

import re
from collections.abc import Iterable

from torch import nn

from fedgraft.common.backbones.load import head_names

__all__ = ["blocks_in", "depths"]

BLOCK = re.compile(r"(.*?\.\d+)(\.|$)")


def blocks_in(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a transformers model's blocks in the model's order, lowest first."""
    return _blocks(_body(model, (name for name, _ in model.named_parameters())))


def depths(model: nn.Module, trained: Iterable[str]) -> tuple[int, ...]:
    """Return the depth of each tensor in ``trained``: 0 in the head, 1 in the last block, ...

    ``model`` is a transformers model with peft's modules, and ``trained`` are names in it.
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
