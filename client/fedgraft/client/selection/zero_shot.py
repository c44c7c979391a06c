"""Zero-shot answers of a dual encoder: the label whose name, as a sentence, is nearest to an image.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (CLIP):
both encoders map into one space, and the answer is the label with the largest cosine. The whole
model is loaded for this, because a backbone uses only its vision tower.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from fedgraft.client.data.batches import Passes, as_tensors
from fedgraft.common.errors import BackboneError
from fedgraft.common.examples import Examples, Indices

__all__ = ["DUAL_MODALITY", "DualEncoder", "is_dual", "open_dual_encoder"]

BATCH = 64
DUAL_MODALITY = "image"  # the encoder beside the text encoder reads this
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")


def is_dual(config: Any) -> bool:
    """Return whether a configuration of transformers has two encoders that share a space."""
    return all(hasattr(config, one) for one in ("text_config", "vision_config", "projection_dim"))


@dataclass(frozen=True)
class DualEncoder:
    """A dual encoder; ``prompts`` are unit embeddings of the labels' sentences, float32 [c, d]."""

    model: Any
    prompts: torch.Tensor

    @torch.inference_mode()
    def answers(self, examples: Examples) -> Indices:
        """Return for each example the label whose sentence is nearest, int64 [n]."""

        def nearest(index: Indices) -> Indices:
            embedded = _embedding(
                self.model.get_image_features(**as_tensors(examples.batch(index)))
            )
            found: Indices = (embedded @ self.prompts.T).argmax(1).numpy()
            return found

        every = Passes(BATCH).over(np.arange(len(examples)), nearest)
        found = [np.empty(0, np.int64), *(labels for _, labels in every)]
        answers: Indices = np.concatenate(found)
        return answers


@lru_cache(maxsize=1)
def open_dual_encoder(folder: Path, labels: tuple[str, ...], prompt: str) -> DualEncoder:
    """Return the model in ``folder`` with its embeddings of ``prompt``; ``{}`` becomes a label.

    Raises:
        BackboneError: the folder has no tokenizer, or cannot be loaded.
    """
    import transformers

    try:
        # Without these files, transformers 5 makes an empty tokenizer that knows no word.
        if not any((folder / name).exists() for name in VOCABULARIES):
            raise FileNotFoundError
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        ).eval()
    except Exception as error:  # loaders of torn files raise almost anything
        raise BackboneError(
            f"{folder.name}: its text encoder cannot be loaded ({type(error).__name__})",
            hint="zero-shot needs the whole dual encoder, with its tokenizer",
        ) from None
    sentences = [prompt.format(label.replace("_", " ").replace("-", " ")) for label in labels]
    read = tokenizer(sentences, padding=True, return_tensors="pt")
    inputs = {name: read[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        return DualEncoder(model, _embedding(model.get_text_features(**inputs)))


def _embedding(output: Any) -> torch.Tensor:
    """Return unit rows; transformers wraps the projected embedding as the pooled output."""
    return functional.normalize(getattr(output, "pooler_output", output).float(), dim=-1)
