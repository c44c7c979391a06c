"""Give a run's adapter away: a standard PEFT folder, or the backbone with it merged in.

Either carries a model card that says where the numbers come from and what they do not show.
"""

import copy
import shutil
from pathlib import Path

from fedgraft.common.adapter_folder import (
    Origin,
    folder_facts,
    model_card,
    replace_folder,
    save_adapter,
)
from fedgraft.common.adapters import Layout, Vector
from fedgraft.common.workbench import Workbench
from fedgraft.server.runs import Run

__all__ = ["export_adapter", "export_merged"]

NOT_COPIED = (".safetensors", ".md")
REWRITTEN = ("config.json", "model.safetensors.index.json")


def export_adapter(
    run: Run, bench: Workbench, exchanged: Layout, adapter: Vector, folder: Path
) -> None:
    """Write ``adapter`` as a PEFT folder that ``PeftModel.from_pretrained`` loads.

    Raises:
        InputError: ``folder`` exists and is not an earlier export, or cannot be written.
    """
    save_adapter(bench, run.job, _origin(run), folder, (exchanged, adapter))


def export_merged(
    run: Run, bench: Workbench, exchanged: Layout, adapter: Vector, folder: Path
) -> None:
    """Write the backbone with ``adapter`` merged in, as a plain transformers folder.

    Raises:
        InputError: ``folder`` exists and is not an earlier export, or cannot be written.
    """
    bench.put((exchanged, adapter))
    model = copy.deepcopy(bench.model).merge_and_unload()
    origin = _origin(run)
    card = model_card(bench, run.job, origin, merged=True)

    def write(target: Path) -> None:
        model.save_pretrained(target)
        for file in bench.backbone.folder.iterdir():
            if file.is_file() and file.suffix not in NOT_COPIED and file.name not in REWRITTEN:
                shutil.copyfile(file, target / file.name)
        (target / "README.md").write_text(card, encoding="utf-8")

    replace_folder(folder, folder_facts(bench, run.job, origin), write)


def _origin(run: Run) -> Origin:
    summary, history = run.summary() or {}, run.history()
    return Origin(
        run=run.name,
        created=run.created,
        rounds=len(history),
        sites=len(summary.get("sites", [])) or max((line["asked"] for line in history), default=0),
        final=summary.get("final", {}),
    )
