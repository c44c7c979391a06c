"""Quantisation of frozen linear layers to 8 or 4 bits, by bitsandbytes, to save memory at a site.

8 bits are LLM.int8 (Dettmers et al. 2022): rows of weights and of activations are scaled and
multiplied as integers. 4 bits are NF4 (Dettmers et al. 2023, "QLoRA"): weights are dequantised for
each product. Trained tensors stay in float32 beside the quantised layers. Heads, embeddings, norms
and convolutions are not quantised. Neither is a layer whose number of inputs is no multiple of
NF4's block: its blocks would straddle rows, and the CPU kernel of bitsandbytes 0.50 computes such
blocks wrongly.
"""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fedgraft.common.backbones.load import head_names
from fedgraft.common.errors import BackboneError, InputError

__all__ = ["quantized_layers"]

BLOCK = 64  # weights that share a scale
APART = (".modules_to_save.", ".original_module.")  # peft's copies of heads and blocks


def quantized_layers(
    model: nn.Module, bits: int, device: torch.device, dtype: torch.dtype
) -> dict[int, nn.Module]:
    """Return the replacement of each frozen linear layer of ``model``, by the layer's ``id``.

    ``model`` is a model of transformers with peft's modules in it; ``dtype`` is that of products.

    Raises:
        InputError: bitsandbytes is not installed.
        BackboneError: the model has no such layer.
    """
    try:
        import bitsandbytes
    except ImportError:
        raise InputError(
            "backbone.quantize needs bitsandbytes", hint='pip install "fedgraft[quantize]"'
        ) from None
    heads = tuple(f"{name}." for name in head_names(model))
    found, adapters = {}, _adapters(model)
    for name, module in model.named_modules():
        path = f"{name}."
        if (
            isinstance(module, nn.Linear)
            and id(module) not in adapters
            and not (heads and path.startswith(heads))
            and not any(part in path for part in APART)
            and module.in_features % BLOCK == 0
        ):
            found[id(module)] = _quantized(module, bits, device, dtype, bitsandbytes.nn)
    if not found:
        raise BackboneError(
            "backbone.quantize: no linear layer of this backbone can be quantised",
            hint=f"it takes layers whose inputs are a multiple of {BLOCK}, outside the head",
        )
    return found


def _adapters(model: nn.Module) -> set[int]:
    """Return the ``id`` of each module that peft put beside a frozen layer, such as a factor."""
    return {
        id(module)
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for name, child in layer.named_children()
        if name != "base_layer"
        for module in child.modules()
    }


def _quantized(
    layer: nn.Linear, bits: int, device: torch.device, dtype: torch.dtype, kinds: Any
) -> nn.Module:
    made: Any
    sizes, has_bias = (layer.in_features, layer.out_features), layer.bias is not None
    weight = layer.weight.detach().to(torch.float32 if device.type == "cpu" else dtype)
    if bits == 4:
        made = kinds.Linear4bit(*sizes, bias=has_bias, compute_dtype=dtype, quant_type="nf4")
        made.weight = kinds.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
        # Otherwise the first pass in eval mode would reorder the weights for a bfloat16 kernel
        # without a backward pass, on a processor that has this kernel.
        made.support_avx512bf16_for_cpu = False
    else:
        made = kinds.Linear8bitLt(*sizes, bias=has_bias, has_fp16_weights=False)
        made.weight = kinds.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    if has_bias:
        made.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    moved: nn.Module = made.to(device)
    return moved
