"""Give a BERT that was saved without its head for gaps, as encoders of sentences are, a first one.

    python simulations/examples/add_gap_head.py models/all-MiniLM-L6-v2 backbones/minilm-gaps

Its dense layer is the identity and its output layer the encoder's own table of words, so that a
hidden state is compared with the words as they are: nothing is trained here.
"""

import argparse
import shutil
from pathlib import Path

import torch
import transformers

COPIED = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")


def add_head(source: Path, folder: Path) -> None:
    """Write ``folder`` with the encoder of ``source`` and the head."""
    model = transformers.BertForMaskedLM.from_pretrained(source)
    transform = model.cls.predictions.transform
    with torch.no_grad():
        transform.dense.weight.copy_(torch.eye(model.config.hidden_size))
        transform.dense.bias.zero_()
        transform.LayerNorm.reset_parameters()
        model.cls.predictions.bias.zero_()
    model.save_pretrained(folder)
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    add_head(options.source, options.folder)
    print(f"{options.folder}: use it as path:{options.folder}")
