"""A backbone's first layers as a folder of its own: a smaller candidate for `fedgraft select`.

    python simulations/benchmarks/truncate.py models/minilm --layers 2 --out models/minilm-2

Weights of the layers above are left out and ``num_hidden_layers`` of config.json says so; all else,
the tokenizer and a pooler or head above the layers too, is copied. Nothing is trained again.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

from safetensors.numpy import load_file, save_file

from fedgraft.common.backbones.folder import PICKLES

LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks|h)\.(\d+)\.")


def truncate(source: Path, layers: int, out: Path) -> Path:
    """Write the first ``layers`` of the model folder ``source`` to the new folder ``out``.

    Raises:
        ValueError: the model has fewer layers, or none that are numbered.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if not 0 < layers <= config.get("num_hidden_layers", 0):
        raise ValueError(f"{source} has {config.get('num_hidden_layers', 'no')} layers")
    tensors = load_file(source / "model.safetensors")
    found = {name: LAYER.search(name) for name in tensors}
    kept = {name for name, match in found.items() if not match or int(match[1]) < layers}
    if layers < config["num_hidden_layers"] and len(kept) == len(tensors):
        raise ValueError(f"{source} names its layers in another way")
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix not in (*PICKLES, ".safetensors"):
            shutil.copyfile(path, out / path.name)
    config["num_hidden_layers"] = layers
    (out / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    weights = {name: tensors[name] for name in sorted(kept)}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def main() -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="a Hugging Face model folder")
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    options = parser.parse_args()
    print(truncate(options.source, options.layers, options.out))


if __name__ == "__main__":
    main()
