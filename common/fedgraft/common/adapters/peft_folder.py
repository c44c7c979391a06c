"""An adapter as a standard PEFT folder, with a model card that states its origin.

The coordinator writes the folder at the end of a run, and every site keeps one with the same files.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from fedgraft.common.adapters.attach import read
from fedgraft.common.adapters.fisher import fisher_of, save_fisher
from fedgraft.common.adapters.model import Workbench
from fedgraft.common.adapters.model_card import Origin, backbone_name, model_card
from fedgraft.common.backbones.load import head_names, load, public_source
from fedgraft.common.config.job import Job
from fedgraft.common.errors import InputError
from fedgraft.common.files import sync_folder
from fedgraft.common.layout import OUTER, Layout, Vector, is_head

__all__ = [
    "folder_facts",
    "has_head",
    "labels_of",
    "read_adapter",
    "replace_folder",
    "save_adapter",
]

MARK = "fedgraft.json"
BASE = "backbone"
WEIGHTS = "adapter_model.safetensors"


def save_adapter(
    bench: Workbench, job: Job, origin: Origin, folder: Path, *parts: tuple[Layout, Vector]
) -> None:
    """Write an adapter as a PEFT folder that ``PeftModel.from_pretrained`` loads.

    The adapter is its initial values with ``parts`` written over them in order.

    Raises:
        InputError: ``folder`` exists and is not an earlier export, or cannot be written.
    """
    bench.put(*parts)
    config = bench.model.peft_config["default"]
    config.base_model_name_or_path = _base(bench)
    card = model_card(bench, job, origin, form="peft")

    def write(target: Path) -> None:
        bench.model.save_pretrained(target, save_embedding_layers=False)
        if bench.drawn:  # the backbone's folder lacks drawn weights: add them
            base: Any = load(bench.backbone, job).model
            base.save_pretrained(target / BASE)
        (target / "README.md").write_text(card, encoding="utf-8")
        if job.training.consolidation is not None:
            whole = bench.layout.merged(bench.initial, *parts)
            save_fisher(target, bench.carried, fisher_of(bench.layout, whole))

    replace_folder(folder, folder_facts(bench, job, origin), write)


def _base(bench: Workbench) -> str:
    """Return the name of the backbone for ``adapter_config.json``.

    Only a backbone of the hub has its name there. Any other name could be that of a stranger's
    model: peft and transformers ask the hub for it. A colon is in no name of the hub.
    """
    source = public_source(bench.backbone.source)
    if source.startswith("hf:"):
        return backbone_name(bench)
    return f"{source} sha256:{bench.backbone.fingerprint}"


def read_adapter(bench: Workbench, folder: Path, *, head: bool = True) -> Vector:
    """Return the adapter in ``folder`` for the job of ``bench``, float32 [bench.layout.size].

    Tensors that travel beside an adapter are zero. Without ``head`` the head keeps the job's
    initial values.

    Raises:
        InputError: no adapter can be read.
    """
    bench.put()
    try:
        weights = load_file(folder / WEIGHTS)
        own = _head_of(bench)
        if not head:
            kept = _other_head(folder)
            weights = {name: one for name, one in weights.items() if not name.startswith(kept)}
            weights |= own
        elif own and not own.keys() & weights.keys():
            raise InputError(
                f"the adapter in {folder} has no head, and the job trains one",
                hint="start.head = false: a new one",
            )
        found = set_peft_model_state_dict(bench.model, weights)
    except InputError:
        raise
    except Exception as error:  # damaged files raise many kinds of error
        raise InputError(
            f"no adapter can be read from {folder} ({type(error).__name__})",
            hint="restore the folder from a backup",
        ) from None
    if found.unexpected_keys:
        raise InputError(f"{folder} is of another job", hint="restore the folder from a backup")
    return read(bench.model, bench.layout)


def _head_of(bench: Workbench) -> dict[str, Any]:
    """Return the job's initial head, in the form of an adapter folder."""
    heads = tuple(f"{OUTER}{name}." for name in head_names(bench.model.get_base_model()))
    own = get_peft_model_state_dict(bench.model, save_embedding_layers=False)
    return {name: one for name, one in own.items() if name.startswith(heads)}


def _other_head(folder: Path) -> tuple[str, ...]:
    """Return the prefixes of the head's names in an adapter folder, according to its own config."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    modules = config.get("modules_to_save") or ()
    names = [f"{OUTER}{name}." for name in modules]
    return tuple(name for name in names if is_head(f"{name}modules_to_save."))


def has_head(folder: Path) -> bool:
    """Return whether the adapter in ``folder`` has a trained head; false if it cannot be read."""
    try:
        return bool(_other_head(folder))
    except (OSError, ValueError):  # ``read_adapter`` says what is wrong
        return False


def labels_of(folder: Path) -> tuple[str, ...] | None:
    """Return the labels of the job that wrote ``folder``; None if they are not known."""
    try:
        facts = json.loads((folder / MARK).read_text(encoding="utf-8"))
        return tuple(facts["labels"])
    except (OSError, ValueError, KeyError, TypeError):  # an adapter from elsewhere
        return None


def folder_facts(bench: Workbench, job: Job, origin: Origin) -> dict[str, Any]:
    """Return the machine-readable facts of a folder."""
    return {
        "run": origin.run,
        "created": origin.created,
        "backbone": backbone_name(bench),
        "backbone_fingerprint": bench.backbone.fingerprint,
        "task": job.job.task,
        "labels": list(job.job.labels),
    }


def replace_folder(folder: Path, facts: dict[str, Any], write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary folder, then replace ``folder`` by it.

    An existing folder is replaced only if it contains our mark, because other people's adapters and
    models look the same as ours.

    Raises:
        InputError: it has no mark, or the folder cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file", hint="name a folder with --out")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise InputError(
            f"{folder} exists and is not an export of fedgraft", hint="name an empty folder"
        )
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        write(temporary)
        (temporary / MARK).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        temporary.chmod(0o755)
        _sync(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise InputError(
            f"cannot write {folder}: {error.strerror}", hint="choose another folder with --out"
        ) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Make the files in ``folder`` survive a power failure."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
