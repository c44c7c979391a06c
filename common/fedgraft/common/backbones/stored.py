"""Weights that load, and are not what they should be: each site would train on nonsense."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from fedgraft.common.errors import BackboneError

__all__ = ["check_layers", "check_stored", "check_values"]

WHOLE = re.compile(r"[UI]\d+|BOOL|F8_\w+|F4|F6_\w+")  # dtypes of weights that need a scale
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def check_values(model: nn.Module, source: str) -> None:
    """Check that every weight is a number, and that not most of them are zero.

    One NaN makes every answer NaN, at every site. A download that was given its room on the disk
    and then broke off is zeros.

    Raises:
        BackboneError: some are no numbers, or most matrices are zero.
    """
    # Of the other buffers, masks may hold infinity.
    statistics = ((name, one) for name, one in model.named_buffers() if "running_" in name)
    matrices, zeros = 0, 0
    for name, value in (*model.named_parameters(), *statistics):
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise BackboneError(
                f"{source}: the weights {name} hold NaN or infinity",
                hint="fetch the backbone again; if they are the same, it was saved after a "
                "training that had failed",
            )
        if value.ndim > 1:
            matrices += 1
            zeros += not bool(value.any())
    if matrices and zeros * 2 > matrices:
        raise BackboneError(
            f"{source}: {zeros} of {matrices} matrices of weights are zero",
            hint="fetch or copy the backbone again: a part of the file never came",
        )


def check_layers(model: nn.Module, unexpected: Iterable[str], source: str) -> None:
    """Check that no layer of the folder is left out because the config counts fewer.

    ``unexpected`` are the names of tensors in the folder that the model does not have. A head for
    another task is one of those, and may be.

    Raises:
        BackboneError: the model has the same tensor in another layer.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    known = {NUMBER.sub("N", name.removeprefix(prefix)) for name, _ in model.named_parameters()}
    for name in sorted(unexpected):
        bare = name.removeprefix(prefix)
        if NUMBER.search(bare) and NUMBER.sub("N", bare) in known:
            raise BackboneError(
                f"{source}: the weights have {name}, a layer that config.json does not count",
                hint="the number of layers in config.json must be that of the weights",
            )


def check_stored(folder: Path, source: str) -> None:
    """Check that no matrix is stored in whole numbers, or in 8 bits or fewer.

    Raises:
        BackboneError: one is. It needs a scale, and a config that has none names none.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no dictionary
                stored = file.get_slice(name)
                if len(stored.get_shape()) > 1 and name.endswith(".weight"):
                    dtype = stored.get_dtype()
                    if WHOLE.fullmatch(dtype):
                        raise BackboneError(
                            f"{source}: {name} is stored as {dtype}, without the scale that "
                            "makes weights of it",
                            hint="a version of the backbone that is not quantised; "
                            "backbone.quantize does it here",
                        )
