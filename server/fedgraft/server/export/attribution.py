"""Attributions of a run's model: the effect of each token or pixel of one input on the answer.

The method is integrated gradients (Sundararajan et al. 2017, "Axiomatic Attribution for Deep
Networks"), computed by captum. The gradients of a label's log-odds against the other labels are
added up along a straight line. The line goes to the input from a baseline without information
(padding for every token except the first and the last, the mean grey for every pixel). The sum over
the input is the difference of the log-odds of the two. ``missing`` is the error of the numerical
sum.

An attribution explains only this one answer of this model. It does not prove that the model is
right for the right reasons, or that it is fair.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedgraft.common.adapters.model import Workbench
from fedgraft.common.encoding import Settings
from fedgraft.common.errors import BackboneError, InputError
from fedgraft.common.modalities.image import open_image

__all__ = ["EXPLAINERS", "Explanation", "explain_image", "explain_text", "write_heat"]

STEPS = 64  # steps along the line


@dataclass(frozen=True)
class Explanation:
    """The ``probabilities`` of all labels, float [c], and ``weights`` of tokens or pixels, float.

    ``label`` is the index of the explained label. ``parts`` are the tokens of a text. They are
    empty for an image, whose weights are [height, width]. ``missing`` is the numerical error.
    """

    label: int
    probabilities: NDArray[np.float32]
    weights: NDArray[np.float32]
    parts: tuple[str, ...]
    missing: float


def explain_text(
    bench: Workbench, given: str, settings: Settings, label: int | None = None
) -> Explanation:
    """Return the tokens of the text ``given`` with weights for ``label`` or the likeliest label.

    Raises:
        InputError: captum is not installed, or the text has no tokens.
        BackboneError: the model has no table of input embeddings, from which the line starts.
    """
    processor = bench.processor
    read = processor.tokenize([given], settings.max_length)
    ids = torch.tensor(read["input_ids"])
    if not ids.numel():
        raise InputError("the text becomes no tokens", hint="give it some words")
    more = {"attention_mask": torch.ones_like(ids)}
    if "token_type_ids" in read:
        more["token_type_ids"] = torch.tensor(read["token_type_ids"])
    silent = torch.full_like(ids, processor.pad_id)
    silent[:, [0, -1]] = ids[:, [0, -1]]  # special tokens, or the token read last
    model: Any = bench.model

    def logits(given: torch.Tensor) -> torch.Tensor:
        repeated = {key: value.expand(len(given), -1) for key, value in more.items()}
        found: torch.Tensor = model(input_ids=given, **repeated).logits
        return found

    table = model.get_input_embeddings()
    if table is None:
        raise BackboneError("this backbone has no table of embeddings", hint="a text classifier")
    attributed, probabilities, target, missing = _integrated(logits, ids, silent, label, table)
    tokens = tuple(processor.tokenizer.convert_ids_to_tokens(ids[0].tolist()))
    return Explanation(target, probabilities, attributed[0].sum(-1), tokens, missing)


def explain_image(
    bench: Workbench, given: str, settings: Settings, label: int | None = None
) -> Explanation:
    """Return the weights of the pixels of the image file ``given``, at the backbone's size.

    They are for ``label`` or the likeliest label.

    Raises:
        InputError: captum is not installed.
        DataError: the file is not an image.
    """
    processor = bench.processor
    image = open_image({"bytes": None, "path": given})
    pixels = torch.from_numpy(processor.pixels([image], settings.normalize))
    model: Any = bench.model

    def logits(given: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(pixel_values=given).logits
        return found

    blank = torch.zeros_like(pixels)
    attributed, probabilities, target, missing = _integrated(logits, pixels, blank, label, None)
    return Explanation(target, probabilities, attributed[0].sum(0), (), missing)


Explainer = Callable[[Workbench, str, Settings, int | None], Explanation]
EXPLAINERS: dict[str, Explainer] = {"text": explain_text, "image": explain_image}
"""By modality, the function that explains the answer to one input, a text or a file's path.

A modality without an entry has no explanations.
"""


def _integrated(
    logits: Callable[[torch.Tensor], torch.Tensor],
    given: torch.Tensor,
    silent: torch.Tensor,
    label: int | None,
    table: Any,
) -> tuple[NDArray[np.float32], NDArray[np.float32], int, float]:
    """Return attributions of ``given`` [1, ...], probabilities [c], the label, and the error."""
    try:
        from captum.attr import IntegratedGradients, LayerIntegratedGradients
    except ImportError:
        raise InputError("explain needs captum", hint='pip install "fedgraft[explain]"') from None
    with torch.inference_mode():
        probabilities = logits(given).softmax(-1)[0]
    target = int(probabilities.argmax()) if label is None else label

    def odds(given: torch.Tensor) -> torch.Tensor:
        """Return log p / (1 - p) of the label, [b]."""
        found = logits(given)
        others = [index for index in range(found.shape[1]) if index != target]
        return found[:, target] - found[:, others].logsumexp(1)

    method = IntegratedGradients(odds) if table is None else LayerIntegratedGradients(odds, table)
    attributed, missing = method.attribute(
        given, baselines=silent, n_steps=STEPS, internal_batch_size=16,
        return_convergence_delta=True,
    )  # fmt: skip
    found: NDArray[np.float32] = attributed.detach().numpy().astype(np.float32)
    return found, probabilities.numpy(), target, float(missing.abs().max())


def write_heat(explanation: Explanation, source: Path, path: Path) -> None:
    """Write a picture of the image at ``source`` and its weights to ``path``.

    Red weights are for the label, blue weights are against it.
    """
    import matplotlib.figure

    weights = explanation.weights
    most = float(np.abs(weights).max()) or 1.0
    figure = matplotlib.figure.Figure(figsize=(7, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(open_image({"bytes": None, "path": str(source)}).convert("RGB"))
    right.imshow(weights, cmap="RdBu_r", vmin=-most, vmax=most)
    for axes, title in ((left, "the image"), (right, "for (red), against (blue)")):
        axes.set_title(title)
        axes.axis("off")
    figure.savefig(path, dpi=120)
