"""A model's folder: its model files, the refusal of unsafe content, and its fingerprint.

Only safetensors are read, and no code of a model repository ever runs. A pickle file, or an
``auto_map`` in a config, would let its author run code at every site.
"""

import hashlib
import json
from pathlib import Path

from fedgraft.common.errors import BackboneError

__all__ = [
    "FINGERPRINTED",
    "PICKLES",
    "fingerprint",
    "model_files",
    "refuse_incomplete",
    "refuse_unsafe",
    "watched_files",
]

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
POINTER = b"version https://git-lfs"
METADATA = "__metadata__"
FINGERPRINTED = (".safetensors", ".json", ".txt", ".model")


def refuse_unsafe(folder: Path, source: str, weights: str = "pretrained") -> None:
    """Refuse a folder whose loading could run code, or that is not a model's folder.

    ``source`` is the user's name of the folder. With ``weights = "random"`` it needs no weights.

    Raises:
        BackboneError: not a Hugging Face folder, no safetensors, pickles, remote code, an adapter.
    """
    if not (folder / "config.json").is_file():
        raise BackboneError(
            f"{source}: no config.json in that folder",
            hint="point backbone.source at a Hugging Face model folder",
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        remote = "auto_map" in config.keys()  # noqa: SIM118  # fails unless it is an object
    except (ValueError, AttributeError):
        refuse_incomplete(folder, source)
        raise BackboneError(f"{source}: config.json is not JSON", hint="copy it again") from None
    if remote:
        raise BackboneError(
            f"{source}: config.json asks to run code from the model's repository (auto_map)",
            hint="fedgraft never runs remote code: use an architecture that transformers ships",
        )
    if (folder / "adapter_config.json").exists():
        raise BackboneError(
            f"{source}: this is an adapter, or has one beside the model",
            hint="point backbone.source at the model itself, without adapter_config.json",
        )
    _refuse_shards_elsewhere(folder, source)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise BackboneError(
            f"{source}: holds weights in a format that can run code: {', '.join(pickles)}",
            hint="save it with model.save_pretrained(DIR) (safetensors) and remove those files",
        )
    if weights == "pretrained" and not list(folder.glob("*.safetensors")):
        raise BackboneError(
            f"{source}: no .safetensors file in that folder",
            hint='save the weights as safetensors, or set backbone.weights = "random"',
        )


def _refuse_shards_elsewhere(folder: Path, source: str) -> None:
    """Refuse an index that names a file which is not a .safetensors file in the same folder.

    An index can name any file, for example a pickle or a file that no fingerprint covers.
    """
    for index in folder.glob("*.index.json"):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            bad = sorted(
                str(name)
                for name in names
                if Path(name).name != name
                or Path(name).suffix != ".safetensors"
                or not (folder / name).is_file()
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BackboneError(
                f"{source}: {index.name} is no index", hint="copy it again"
            ) from None
        if bad:
            raise BackboneError(
                f"{source}: {index.name} names {bad[0]}, which is no .safetensors file beside it",
                hint="save the model again with model.save_pretrained(DIR)",
            )


def refuse_incomplete(folder: Path, source: str) -> None:
    """Refuse files that stand for other ones, and weights that are cut short.

    Whoever cannot read a model asks here for the cause.

    Raises:
        BackboneError: there is such a file.
    """
    for path in model_files(folder):
        _refuse_incomplete(path, source)


def _refuse_incomplete(path: Path, source: str) -> None:
    """Refuse one file of a model.

    A safetensors file is the length of its header (8 bytes), the header, and the tensors, which the
    header places (https://github.com/huggingface/safetensors).
    """
    with path.open("rb") as file:
        start = file.read(len(POINTER))
        if start == POINTER:
            raise BackboneError(
                f"{source}: {path.name} is a pointer of Git LFS, not the file itself",
                hint="git lfs pull, where the folder was cloned",
            )
        if path.suffix != ".safetensors":
            return
        size, length = path.stat().st_size, int.from_bytes(start[:8], "little")
        file.seek(8)
        try:
            header = json.loads(file.read(length)) if length <= size else {"": {}}
            ends = [one["data_offsets"][1] for name, one in header.items() if name != METADATA]
            needed = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            raise BackboneError(
                f"{source}: {path.name} is no safetensors file, or is cut short",
                hint="fetch or copy it again",
            ) from None
    if size < needed:
        raise BackboneError(
            f"{source}: {path.name} is cut short: {size:,} of {needed:,} bytes",
            hint="fetch or copy it again",
        )


def model_files(folder: Path) -> list[Path]:
    """Return the files in ``folder`` that define the model, by name; only these are loaded."""
    return sorted(p for p in folder.iterdir() if p.suffix in FINGERPRINTED and p.is_file())


def watched_files(folder: Path) -> list[Path]:
    """Return the files of a model and its folder, in which another file can appear."""
    return [folder, *model_files(folder)] if folder.is_dir() else [folder]


def fingerprint(folder: Path, weights: str) -> str:
    """Return the SHA-256 (hex) over names and contents of ``model_files``, or of the config.

    Random weights need only the config.
    """
    files = model_files(folder) if weights != "random" else [folder / "config.json"]
    digest = hashlib.sha256(f"fedgraft-backbone/1 {weights}\n".encode())
    for path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()
