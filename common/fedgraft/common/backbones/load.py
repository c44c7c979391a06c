"""The frozen model: find it, refuse unsafe content, fingerprint it, load it.

``folder.py`` decides what is unsafe, and gives the reasons.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedgraft.common.backbones.blob_store import open_store
from fedgraft.common.backbones.folder import (
    FINGERPRINTED,
    fingerprint,
    refuse_incomplete,
    refuse_unsafe,
)
from fedgraft.common.backbones.stored import check_layers, check_stored, check_values
from fedgraft.common.backbones.timm import is_timm, name_timm_labels, timm_heads
from fedgraft.common.config.job import Job
from fedgraft.common.errors import BackboneError, first_line
from fedgraft.common.seeds import derive_seed
from fedgraft.common.tasks import Task

__all__ = [
    "Backbone",
    "LoadedBackbone",
    "body_names",
    "find_backbone",
    "head_names",
    "load",
    "locate",
    "own_labels",
    "public_source",
    "read_config",
]

BUILTIN = Path(__file__).parents[1] / "builtin"


@dataclass(frozen=True)
class Backbone:
    """A backbone on this machine: its source, its folder and its fingerprint.

    ``fingerprint`` is the SHA-256 (hex) over names and contents of its weights, config and
    tokenizer files. Two folders with equal fingerprints compute the same function.
    """

    source: str
    folder: Path
    fingerprint: str
    weights: str

    @property
    def config(self) -> dict[str, Any]:
        """Return the content of the folder's ``config.json``."""
        return dict(json.loads((self.folder / "config.json").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class LoadedBackbone:
    """The frozen model in eval mode; ``fresh_head``: its head has no pre-training.

    ``drawn`` are the names of the parameters that are not in the folder and were drawn from a seed.
    """

    model: nn.Module
    fresh_head: bool
    drawn: tuple[str, ...]
    parameters: int


def find_backbone(source: str, *, weights: str = "pretrained") -> Backbone:
    """Return the checked local folder of a job's ``backbone.source``.

    The source is ``hf:REPO[@REVISION]``, ``path:DIR``, ``builtin:NAME``, or ``manifest:DIGEST`` for
    a backbone in this process's store (``blob_store.open_store``).

    Raises:
        BackboneError: absent, damaged, not a Hugging Face folder, pickle weights or remote code.
    """
    folder = locate(source)
    refuse_unsafe(folder, source, weights)
    return Backbone(source, folder, fingerprint(folder, weights), weights)


def locate(source: str) -> Path:
    """Return the local folder of a job's ``backbone.source``, unchecked.

    Raises:
        BackboneError: there is no such backbone here.
    """
    kind, _, name = source.partition(":")
    places = {"hf": _download, "path": Path, "builtin": _builtin, "manifest": _stored}
    return places[kind](name)


def load(backbone: Backbone, job: Job) -> LoadedBackbone:
    """Load the backbone for the job's task and labels: frozen, fp32, on the CPU.

    Weights that the folder lacks (usually a head for these labels) are drawn from a seed that is a
    hash of the job's seed, so that they are equal at every site. A head in the folder is kept only
    if the folder says that it was trained for the same: its label names are the job's labels, or
    for a regression ``problem_type`` in ``config.json`` is ``"regression"``
    (``Task.knows_head``). A head for something else has no information about this job.

    Raises:
        BackboneError: transformers cannot build this task's model from the folder.
    """
    labels = job.job.labels
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(job.job.seed, "backbone"))
        model, missing = _build(backbone, job.task, labels)
        if is_timm(model):
            name_timm_labels(model.config, labels)
        fresh = _head_is_fresh(model, missing, backbone, job)
        if fresh:
            for name in head_names(model):
                _reset(model.get_submodule(name), model)
    check_values(model, backbone.source)
    model.requires_grad_(False)
    heads = tuple(f"{name}." for name in head_names(model)) if fresh else ()
    every = [name for name, _ in model.named_parameters()]
    if backbone.weights == "random":
        missing = set(every)
    drawn = tuple(name for name in every if name in missing or (heads and name.startswith(heads)))
    count = sum(parameter.numel() for parameter in model.parameters())
    return LoadedBackbone(model.eval(), fresh, drawn, count)


def read_config(backbone: Backbone) -> Any:
    """Return the backbone's configuration as transformers reads it.

    Raises:
        BackboneError: transformers does not know this architecture, or timm is not installed.
    """
    import transformers

    import fedgraft.common.backbones.cifar_resnet  # noqa: F401  # registers an architecture

    if "pretrained_cfg" in backbone.config and not find_spec("timm"):
        raise BackboneError(
            f"{backbone.source} is a model of timm, which is not installed here",
            hint='pip install "fedgraft[timm]"',
        )
    try:
        return transformers.AutoConfig.from_pretrained(
            backbone.folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # hostile configs raise almost any error
        raise BackboneError(
            f"{backbone.source}: {first_line(error)}",
            hint="it must be a model that this version of transformers ships",
        ) from None


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the head's modules.

    They are the top-level children with parameters that do not belong to the backbone's body.
    """
    if is_timm(model):
        return timm_heads(model)
    body = body_names(model)
    return tuple(
        name
        for name, child in model.named_children()
        # T5's embedding table is a child beside its encoder, but belongs to the body.
        if not isinstance(child, nn.Embedding)
        and name not in body
        and any(True for _ in child.parameters())
    )


def body_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules below the head: the child that transformers calls base model.

    If there is no base model (the encoder of Whisper, the vision tower of CLIP), each child that is
    a transformers model itself.
    """
    prefix = getattr(model, "base_model_prefix", "")
    children = dict(model.named_children())
    if prefix in children:
        return (prefix,)
    return tuple(name for name, child in children.items() if hasattr(child, "base_model_prefix"))


def own_labels(backbone: Backbone) -> list[str | None]:
    """Return the labels of the head in the backbone's folder, according to its config."""
    config = backbone.config
    named = config.get("id2label") or dict(enumerate(config.get("label_names") or ()))  # timm
    by_index = {int(index): name for index, name in named.items()}
    return [by_index.get(index) for index in range(len(by_index))]


def public_source(source: str) -> str:
    """Return ``source`` in the form that others may see: ``path:NAME`` without folders.

    A backbone with a manifest in the store has the name that its sender gave it.
    """
    kind, _, name = source.partition(":")
    if kind == "manifest":
        try:
            named = open_store().manifest(name).source
        except BackboneError:
            return source
        return named if named.startswith(("hf:", "builtin:")) else f"path:{_last(named) or name}"
    return f"path:{_last(name)}" if kind == "path" else source


def _last(path: str) -> str:
    return Path(path.removeprefix("path:")).name


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    repository, _, revision = name.partition("@")
    try:
        # Pickles are not even downloaded.
        patterns = [*(f"*{suffix}" for suffix in FINGERPRINTED), "README.md"]  # has the licence
        revised = revision or None
        return Path(snapshot_download(repository, revision=revised, allow_patterns=patterns))
    except GatedRepoError:
        raise BackboneError(
            f"hf:{repository} is gated: its owner lets in who asks",
            hint=f"ask at https://huggingface.co/{repository}, then: hf auth login",
        ) from None
    except RepositoryNotFoundError:
        raise BackboneError(
            f"there is no hf:{repository}, or it is private",
            hint="check the name; if it is private: hf auth login",
        ) from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        raise BackboneError(
            f"the hub does not give hf:{name} (status {status})",
            hint="hf auth login, with a token that may read it"
            if status in (401, 403)
            else "check the name and try again later, or copy the folder and use path:DIR",
        ) from None
    except (LocalEntryNotFoundError, ValueError, OSError) as error:
        raise BackboneError(
            f"cannot fetch hf:{name} ({type(error).__name__})",
            hint="check the name and the network, or copy the folder and use path:DIR",
        ) from None


def _stored(digest: str) -> Path:
    """Return the folder; every chunk is hashed again, because the disk may have changed a bit."""
    store = open_store()
    store.check(store.manifest(digest))
    return store.folder(digest)


def _builtin(name: str) -> Path:
    known = sorted(path.name for path in BUILTIN.iterdir() if path.is_dir())
    if name not in known:
        raise BackboneError(f"no built-in backbone {name}", hint=f"there is: {', '.join(known)}")
    return BUILTIN / name


def _build(backbone: Backbone, task: Task, labels: Sequence[str]) -> tuple[nn.Module, set[str]]:
    """Return the model and the names of the weights that the folder does not have."""
    import transformers

    import fedgraft.common.backbones.cifar_resnet  # noqa: F401  # registers an architecture

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    auto = getattr(transformers, task.auto_class)
    options = task.model_options(backbone.config, labels, backbone.source)
    try:
        if backbone.weights == "random":
            config = transformers.AutoConfig.from_pretrained(
                backbone.folder, trust_remote_code=False, local_files_only=True, **options
            )
            if hasattr(auto, "from_config"):
                return auto.from_config(config, trust_remote_code=False).float(), set()
            return auto(config).float(), set()  # one architecture, where there is no auto class
        model, info = auto.from_pretrained(
            backbone.folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # hostile or damaged files make loaders raise almost any error
        refuse_incomplete(backbone.folder, backbone.source)
        raise BackboneError(
            f"{backbone.source} cannot be loaded for {task.name}: {first_line(error)}",
            hint=f"it must be a model that {task.auto_class} can load",
        ) from None
    mismatched = {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
    missing = set(info["missing_keys"]) | mismatched
    _refuse_random_layers(model, missing, backbone.source, task)
    check_layers(model, info["unexpected_keys"], backbone.source)
    if "quantization_config" not in backbone.config:  # transformers has read it, with its scales
        check_stored(backbone.folder, backbone.source)
    return model, missing


def _refuse_random_layers(model: nn.Module, missing: set[str], source: str, task: Task) -> None:
    """Refuse a model with missing weights that would be frozen random values.

    A head that trains may be missing, and a pooler is often missing. The token for a hidden patch
    may be missing too: its initial value is zeros, which are not random.
    """
    heads = tuple(f"{name}." for name in head_names(model)) if task.head_trains else ()
    gaps = sorted(
        key
        for key in missing
        if not key.startswith(heads) and not any(one in key for one in (".pooler.", ".mask_token"))
    )
    own = tuple(f"{name}." for name in head_names(model))
    if gaps and all(name.startswith(own) for name in gaps):
        raise BackboneError(
            f"{source} was saved without the head that {task.name} predicts with",
            hint="a backbone that still has it, such as the model that this one was made from",
        )
    if gaps:
        raise BackboneError(
            f"{source}: {len(gaps)} weights of the backbone are missing or of another shape, "
            f"such as {gaps[0]}",
            hint="config.json and the weights do not belong together: copy the folder again",
        )


def _head_is_fresh(model: nn.Module, missing: set[str], backbone: Backbone, job: Job) -> bool:
    """Return whether the head is not from the folder, or was trained for something else."""
    if backbone.weights == "random":
        return True
    if not job.task.knows_head(backbone.config, own_labels(backbone), job.job.labels):
        return True
    heads = tuple(f"{name}." for name in head_names(model))
    return any(key.startswith(heads) for key in missing)


def _reset(head: nn.Module, model: nn.Module) -> None:
    """Initialise a head again, as transformers does for this architecture."""
    for parameter in head.parameters():
        parameter._is_hf_initialized = False  # type: ignore[attr-defined]  # set by loading
    initialise = model._init_weights
    for module in head.modules():
        initialise(module)  # type: ignore[operator]
