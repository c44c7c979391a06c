"""The most bytes of tensors that are in memory at a time."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Peak"]


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the tensors that operations inside make; ``bytes`` is the most there were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: int = 0
        self.now: int = 0
        self.seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if torch.is_tensor(tensor):
                self._add(tensor.untyped_storage(), given)
        self.bytes = max(self.bytes, self.now)
        return output

    def _add(self, storage: Any, given: set[int]) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.seen or key in given:
            return
        self.now += size

        def gone(reference: object) -> None:
            self.now -= size
            del self.seen[key]

        self.seen[key] = weakref.ref(storage, gone)
