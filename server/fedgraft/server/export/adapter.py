"""Export a run's adapter: a standard PEFT folder, or the backbone with the adapter merged in.

Both exports have a model card, which gives the source of the numbers and what they do not show.
"""

import copy
import shutil
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open

from fedgraft.common.adapters.model import Workbench
from fedgraft.common.adapters.model_card import Origin, model_card
from fedgraft.common.adapters.peft_folder import folder_facts, replace_folder, save_adapter
from fedgraft.common.backbones.load import Backbone
from fedgraft.common.layout import Layout, Vector
from fedgraft.server.runs.run_folder import Run
from fedgraft.server.state import kept_validation

__all__ = ["export_adapter", "export_merged", "origin_of"]

NOT_COPIED = (".safetensors", ".md")
REWRITTEN = ("config.json", "model.safetensors.index.json")


def export_adapter(
    run: Run, bench: Workbench, exchanged: Layout, adapter: Vector, folder: Path
) -> None:
    """Write ``adapter`` as a PEFT folder that ``PeftModel.from_pretrained`` loads.

    Raises:
        InputError: ``folder`` exists and is not an earlier export, or cannot be written.
    """
    save_adapter(bench, run.job, origin_of(run), folder, (exchanged, adapter))


def export_merged(
    run: Run, bench: Workbench, exchanged: Layout, adapter: Vector, folder: Path
) -> None:
    """Write the backbone with ``adapter`` merged in, as a plain transformers folder.

    Raises:
        InputError: ``folder`` exists and is not an earlier export, or cannot be written.
    """
    bench.put((exchanged, adapter))
    model = copy.deepcopy(bench.model).merge_and_unload()
    model.to(_stored_dtype(bench.backbone))  # computed in float32; written as the backbone is
    origin = origin_of(run)
    card = model_card(bench, run.job, origin, form="merged")

    def write(target: Path) -> None:
        model.save_pretrained(target)
        for file in bench.backbone.folder.iterdir():
            if file.is_file() and file.suffix not in NOT_COPIED and file.name not in REWRITTEN:
                shutil.copyfile(file, target / file.name)
        (target / "README.md").write_text(card, encoding="utf-8")

    replace_folder(folder, folder_facts(bench, run.job, origin), write)


def _stored_dtype(backbone: Backbone) -> torch.dtype:
    """Return bfloat16 if all weights in the backbone's folder are, or else float32.

    float16 is no type for a merge: its range is small, and many CPUs compute in it badly or not.
    """
    kinds = set[str]()
    if backbone.weights != "random":
        for file in backbone.folder.glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                kinds |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    floats = kinds & {"BF16", "F16", "F32", "F64"}
    return torch.bfloat16 if floats == {"BF16"} else torch.float32


def origin_of(run: Run) -> Origin:
    """Return the facts of ``run`` for the card: the number of sites, but no site's name."""
    summary, history = run.summary() or {}, run.history()
    sites = summary.get("sites", [])
    return Origin(
        run=run.name,
        created=run.created,
        rounds=len(history),
        sites=len(sites) or max((line["asked"] for line in history), default=0),
        final=summary.get("final", {}),
        validation=kept_validation(history, run.job.rounds.early_stopping) or {},
        outcomes=Counter(site["outcome"] for site in sites),
        examples=sum(site["examples"] for site in sites),
    )
