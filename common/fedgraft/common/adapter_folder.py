"""An adapter as a standard PEFT folder, with a model card that says where it comes from.

The coordinator writes one at the end of a run, and every site keeps one: the same files.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from fedgraft.common.adapters import Layout, Vector, read
from fedgraft.common.backbones import load, public_source
from fedgraft.common.errors import InputError
from fedgraft.common.files import sync_folder
from fedgraft.common.job import Job
from fedgraft.common.workbench import Workbench

__all__ = [
    "Origin",
    "folder_facts",
    "model_card",
    "read_adapter",
    "replace_folder",
    "save_adapter",
]

MARK = "fedgraft.json"
BASE = "backbone"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Origin:
    """Where an adapter comes from: the run, its ``rounds`` and ``sites`` (0: not known).

    ``final`` is what a summary says of the models on the pooled test set; ``own_head`` is whether a
    head that stayed at its site is in the folder.
    """

    run: str
    created: str
    rounds: int
    sites: int = 0
    final: Mapping[str, Any] = field(default_factory=dict)
    own_head: bool = False


def save_adapter(
    bench: Workbench, job: Job, origin: Origin, folder: Path, *parts: tuple[Layout, Vector]
) -> None:
    """Write an adapter as a PEFT folder that ``PeftModel.from_pretrained`` loads.

    It is what the adapter starts from with ``parts`` written over it in order.

    Raises:
        InputError: ``folder`` exists and is not an earlier export, or cannot be written.
    """
    bench.put(*parts)
    config = bench.model.peft_config["default"]
    config.base_model_name_or_path = _name(bench)
    card = model_card(bench, job, origin, merged=False)

    def write(target: Path) -> None:
        bench.model.save_pretrained(target, save_embedding_layers=False)
        if bench.drawn:  # the backbone's folder is not all of the model: give the rest along
            base: Any = load(bench.backbone, job).model
            base.save_pretrained(target / BASE)
        (target / "README.md").write_text(card, encoding="utf-8")

    replace_folder(folder, folder_facts(bench, job, origin), write)


def read_adapter(bench: Workbench, folder: Path) -> Vector:
    """The adapter in ``folder``, float32 [bench.layout.size], of the job that ``bench`` is for.

    Raises:
        InputError: there is none that can be read.
    """
    bench.put()
    try:
        found = set_peft_model_state_dict(bench.model, load_file(folder / WEIGHTS))
    except Exception as error:  # torn files raise many kinds
        raise InputError(
            f"no adapter can be read from {folder} ({type(error).__name__})",
            hint="restore the folder from a backup",
        ) from None
    if found.unexpected_keys:
        raise InputError(f"{folder} is of another job", hint="restore the folder from a backup")
    return read(bench.model, bench.layout)


def model_card(bench: Workbench, job: Job, origin: Origin, *, merged: bool) -> str:
    """The model card, Markdown with the metadata that model hubs read."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701  # Markdown, and every value is ours or the job's
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("model_card.md.j2").render(
        origin=origin,
        job=job,
        bench=bench,
        source=public_source(bench.backbone.source),
        base=_name(bench),
        base_code=_base_code(public_source(bench.backbone.source)),
        merged=merged,
    )


def folder_facts(bench: Workbench, job: Job, origin: Origin) -> dict[str, Any]:
    """What a folder says of itself to machines."""
    return {
        "run": origin.run,
        "created": origin.created,
        "backbone": _name(bench),
        "backbone_fingerprint": bench.backbone.fingerprint,
        "task": job.job.task,
        "labels": list(job.job.labels),
    }


def _name(bench: Workbench) -> str:
    """The backbone's name without this machine's folders."""
    kind, _, name = public_source(bench.backbone.source).partition(":")
    return name.partition("@")[0] if kind == "hf" else name


def _base_code(source: str) -> str:
    """The first argument of ``from_pretrained`` for this backbone, as Python."""
    kind, _, name = source.partition(":")
    if kind != "hf":
        return repr(f"FOLDER_OF/{name}")
    repository, _, revision = name.partition("@")
    return repr(repository) + (f", revision={revision!r}" if revision else "")


def replace_folder(folder: Path, facts: dict[str, Any], write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary folder, then put it in the place of ``folder``.

    What is there already is replaced only if it carries our mark: an adapter or model of somebody
    else looks just like ours.

    Raises:
        InputError: it does not, or the folder cannot be written.
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
    """Make what lies in ``folder`` survive a power cut."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
