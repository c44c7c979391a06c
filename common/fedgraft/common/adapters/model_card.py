"""The model card of an export: the model, its origin, its quality and its limits.

The form follows Mitchell et al. 2019, "Model Cards for Model Reporting" (arXiv:1810.03993). A
statement on the data follows Bender and Friedman 2018, "Data Statements for Natural Language
Processing" (TACL 6), with the facts that a federation can know. The card names no site. The
metadata is in the format of the Hugging Face hub.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fedgraft.common.adapters.model import Workbench
from fedgraft.common.backbones.load import public_source, read_config
from fedgraft.common.backbones.manifest import licence_of
from fedgraft.common.config.job import Job
from fedgraft.common.metrics.metric import Metric

__all__ = ["Form", "Origin", "backbone_name", "model_card"]

Form = Literal["peft", "merged", "onnx"]
LIBRARIES = {"peft": "peft", "merged": "transformers", "onnx": "onnx"}


@dataclass(frozen=True)
class Origin:
    """The origin of a model: the run, its ``rounds`` and ``sites`` (0: not known).

    ``final`` is the summary's results of the models on the pooled test set. ``validation`` is the
    result of the last round's federated validation. ``outcomes`` counts the sites that federating
    helped or hurt. ``examples`` (0: not known) is the number of training examples. ``own_parts``:
    the folder contains the tensors that stayed at a site, a head or factors.
    """

    run: str
    created: str
    rounds: int
    sites: int = 0
    final: Mapping[str, Any] = field(default_factory=dict)
    validation: Mapping[str, Any] = field(default_factory=dict)
    outcomes: Mapping[str, int] = field(default_factory=dict)
    examples: int = 0
    own_parts: bool = False


def model_card(bench: Workbench, job: Job, origin: Origin, *, form: Form) -> str:
    """Return the model card, Markdown with the metadata that model hubs read."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701  # Markdown; all values are ours or the job's
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _cell
    source, licence = public_source(bench.backbone.source), licence_of(bench.backbone.folder)
    federated = origin.final.get("federated") or origin.validation
    return environment.get_template("model_card.md.j2").render(
        metadata=_metadata(job, source, licence, federated, form).to_yaml(),
        origin=origin,
        job=job,
        bench=bench,
        source=source,
        licence=licence,
        base=backbone_name(bench),
        base_code=_base_code(source),
        task=job.task,
        form=form,
        usage=_usage(bench, job),
        prepared=job.task.describe_input(bench.processor, job.settings),
        kept_note=job.rule.card_note(
            own_parts=origin.own_parts, shared_head=job.method.head == "shared"
        ),
        shown=_shown(job, federated, origin.final),
        groups=federated.get("groups") or {},
        gap=federated.get("accuracy_gap"),
    )


def _usage(bench: Workbench, job: Job) -> dict[str, Any]:
    """Return the options with which the backbone is loaded for the adapter.

    A classifier such as GPT-2's finds the last word of each text by the padding token, and the
    backbone's folder may name none.
    """
    usage = dict(job.task.usage(job.job.labels))
    pad = getattr(bench.model.config, "pad_token_id", None)
    if usage and pad is not None and read_config(bench.backbone).pad_token_id != pad:
        usage["pad_token_id"] = pad
    return usage


def backbone_name(bench: Workbench) -> str:
    """Return the backbone's name without the folders of this machine."""
    kind, _, name = public_source(bench.backbone.source).partition(":")
    return name.partition("@")[0] if kind == "hf" else name


def _metadata(
    job: Job, source: str, licence: str, federated: Mapping[str, Any], form: Form
) -> ModelCardData:
    """Return the front matter; it has a licence only if hubs know that of the backbone's card."""
    kind, _, name = source.partition(":")
    tags = ["federated-learning", "fedgraft", *([job.method.kind] if form == "peft" else [])]
    return ModelCardData(
        base_model=name.partition("@")[0] if kind == "hf" else None,
        license=licence if re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence) else None,
        library_name=LIBRARIES[form],
        pipeline_tag=job.task.pipeline,
        tags=tags,
        model_name=job.job.name,
        eval_results=list(_results(job, federated)) or None,
    )


def _results(job: Job, federated: Mapping[str, Any]) -> Iterator[EvalResult]:
    for metric in job.task.card_metrics:
        if federated.get(metric.key) is not None:
            yield EvalResult(
                task_type=job.task.pipeline,
                dataset_type="private",
                dataset_name="examples of the federation's sites",
                metric_type=metric.hub or metric.key,
                metric_name=metric.name,
                metric_value=round(federated[metric.key], 4),
            )


def _shown(job: Job, federated: Mapping[str, Any], final: Mapping[str, Any]) -> list[Metric]:
    """Return the metrics that at least one model has; each gets a column."""
    models = [federated, *(one for one in final.values() if one)]
    return [
        metric
        for metric in job.task.card_metrics
        if any(one.get(metric.key) is not None for one in models)
    ]


def _cell(metrics: Mapping[str, Any], metric: Metric) -> str:
    """Return a metric with its interval, if there is one."""
    ends = metrics.get(f"{metric.key}_interval")
    span = " (" + " to ".join(metric.text(end, unit="") for end in ends) + ")" if ends else ""
    return metric.text(metrics.get(metric.key)) + span


def _base_code(source: str) -> str:
    """Return the first argument of ``from_pretrained`` for this backbone, as Python."""
    kind, _, name = source.partition(":")
    if kind != "hf":
        return repr(f"FOLDER_OF/{name}")
    repository, _, revision = name.partition("@")
    return repr(repository) + (f", revision={revision!r}" if revision else "")
