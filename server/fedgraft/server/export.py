"""Give a run's adapter away: a standard PEFT folder, or the backbone with it merged in.

Either carries a model card that says where the numbers come from and what they do not show.
"""

import copy
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedgraft.common.adapters import Layout, Vector
from fedgraft.common.backbones import load
from fedgraft.common.errors import InputError
from fedgraft.common.workbench import Workbench
from fedgraft.server.runs import Run

__all__ = ["export_adapter", "export_merged"]

MARK = "fedgraft.json"
BASE = "backbone"
NOT_COPIED = (".safetensors", ".md")
REWRITTEN = ("config.json", "model.safetensors.index.json")


def export_adapter(
    run: Run, bench: Workbench, exchanged: Layout, adapter: Vector, folder: Path
) -> None:
    """Write ``adapter`` as a PEFT folder that ``PeftModel.from_pretrained`` loads.

    Raises:
        InputError: ``folder`` exists and is not an earlier export, or cannot be written.
    """
    bench.put((exchanged, adapter))
    config = bench.model.peft_config["default"]
    config.base_model_name_or_path = _public_name(bench.backbone.source)
    card = model_card(run, bench, merged=False)

    def write(target: Path) -> None:
        bench.model.save_pretrained(target, save_embedding_layers=False)
        if bench.drawn:  # the backbone's folder is not all of the model: give the rest along
            base: Any = load(bench.backbone, run.job).model
            base.save_pretrained(target / BASE)
        (target / "README.md").write_text(card, encoding="utf-8")

    _replace_folder(folder, _facts(run, bench), write)


def export_merged(
    run: Run, bench: Workbench, exchanged: Layout, adapter: Vector, folder: Path
) -> None:
    """Write the backbone with ``adapter`` merged in, as a plain transformers folder.

    Raises:
        InputError: ``folder`` exists and is not an earlier export, or cannot be written.
    """
    bench.put((exchanged, adapter))
    model = copy.deepcopy(bench.model).merge_and_unload()
    card = model_card(run, bench, merged=True)

    def write(target: Path) -> None:
        model.save_pretrained(target)
        for file in bench.backbone.folder.iterdir():
            if file.is_file() and file.suffix not in NOT_COPIED and file.name not in REWRITTEN:
                shutil.copyfile(file, target / file.name)
        (target / "README.md").write_text(card, encoding="utf-8")

    _replace_folder(folder, _facts(run, bench), write)


def model_card(run: Run, bench: Workbench, *, merged: bool) -> str:
    """The model card, Markdown with the metadata that model hubs read."""
    environment = Environment(
        loader=PackageLoader("fedgraft.server", "."),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701  # Markdown, and every value is ours or the job's
        trim_blocks=True,
        lstrip_blocks=True,
    )
    facts: dict[str, Any] = {
        "run": run,
        "job": run.job,
        "bench": bench,
        "base": _public_name(bench.backbone.source),
        "base_code": _base_code(bench.backbone.source),
        "merged": merged,
        "rounds": len(run.history()),
        "final": (run.summary() or {}).get("final", {}),
        "sites": (run.summary() or {}).get("sites", []),
    }
    return environment.get_template("model_card.md.j2").render(facts)


def _facts(run: Run, bench: Workbench) -> dict[str, Any]:
    """What an export says of itself to machines."""
    return {
        "run": run.name,
        "created": run.created,
        "backbone": _public_name(bench.backbone.source),
        "backbone_fingerprint": bench.backbone.fingerprint,
        "task": run.job.job.task,
        "labels": list(run.job.job.labels),
    }


def _public_name(source: str) -> str:
    """The backbone's name without this machine's folders."""
    kind, _, name = source.partition(":")
    return Path(name).name if kind == "path" else name.partition("@")[0]


def _base_code(source: str) -> str:
    """The first argument of ``from_pretrained`` for this backbone, as Python."""
    kind, _, name = source.partition(":")
    if kind != "hf":
        return repr(f"FOLDER_OF/{_public_name(source)}")
    repository, _, revision = name.partition("@")
    return repr(repository) + (f", revision={revision!r}" if revision else "")


def _replace_folder(folder: Path, facts: dict[str, Any], write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary folder, then put it in the place of ``folder``.

    What is there already is replaced only if it carries our mark: an adapter or model of somebody
    else looks just like ours.
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
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    except OSError as error:
        raise InputError(
            f"cannot write {folder}: {error.strerror}", hint="choose another folder with --out"
        ) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
