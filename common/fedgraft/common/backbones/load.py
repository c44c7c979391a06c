"""The frozen model: find it, refuse what is unsafe, fingerprint it, load it.

What is refused, and why, is in ``model_folder.py``.
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
from fedgraft.common.backbones.folder import FINGERPRINTED, fingerprint, refuse_unsafe
from fedgraft.common.backbones.timm import is_timm, name_timm_labels, timm_heads
from fedgraft.common.config.job import Job
from fedgraft.common.errors import BackboneError
from fedgraft.common.seeds import derive_seed
from fedgraft.common.tasks import Task

__all__ = [
    "Backbone",
    "LoadedBackbone",
    "body_names",
    "find_backbone",
    "head_names",
    "load",
    "own_labels",
    "public_source",
    "read_config",
]

BUILTIN = Path(__file__).parents[1] / "builtin"


@dataclass(frozen=True)
class Backbone:
    """A backbone on this machine: where it came from, its folder, and what identifies it.

    ``fingerprint`` is the SHA-256 (hex) over names and contents of its weights, config and
    tokenizer files; two folders with equal fingerprints compute the same function.
    """

    source: str
    folder: Path
    fingerprint: str
    weights: str

    @property
    def config(self) -> dict[str, Any]:
        """The folder's ``config.json``."""
        return dict(json.loads((self.folder / "config.json").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class LoadedBackbone:
    """The frozen model in eval mode; ``fresh_head`` says its head carries no pre-training.

    ``drawn`` names the parameters that the folder does not have: they were drawn from a seed.
    """

    model: nn.Module
    fresh_head: bool
    drawn: tuple[str, ...]
    parameters: int


def find_backbone(source: str, *, weights: str = "pretrained") -> Backbone:
    """Resolve a job's ``backbone.source`` to a checked local folder.

    ``hf:REPO[@REVISION]``, ``path:DIR``, ``builtin:NAME``, or ``manifest:DIGEST`` of what lies in
    this process's store of backbones (``blobs.open_store``).

    Raises:
        BackboneError: not there, damaged, no Hugging Face folder, pickle weights or remote code.
    """
    kind, _, name = source.partition(":")
    places = {"hf": _download, "path": Path, "builtin": _builtin, "manifest": _stored}
    folder = places[kind](name)
    refuse_unsafe(folder, source, weights)
    return Backbone(source, folder, fingerprint(folder, weights), weights)


def load(backbone: Backbone, job: Job) -> LoadedBackbone:
    """Load the backbone for the job's task and labels, every parameter frozen, fp32, on the CPU.

    Weights that the folder lacks (a head for these labels, usually) start from a seed hashed from
    the job's, so that every site starts from the same ones. A head in the folder is kept only if
    its label names are the job's; a head for other labels says nothing about these.

    Raises:
        BackboneError: transformers cannot build this task's model from the folder.
    """
    labels = job.job.labels
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(job.job.seed, "backbone"))
        model, missing = _build(backbone, job.task, labels)
        if is_timm(model):
            name_timm_labels(model.config, labels)
        fresh = _head_is_fresh(model, missing, backbone, labels)
        if fresh:
            for name in head_names(model):
                _reset(model.get_submodule(name), model)
    model.requires_grad_(False)
    heads = tuple(f"{name}." for name in head_names(model)) if fresh else ()
    every = [name for name, _ in model.named_parameters()]
    if backbone.weights == "random":
        missing = set(every)
    drawn = tuple(name for name in every if name in missing or (heads and name.startswith(heads)))
    count = sum(parameter.numel() for parameter in model.parameters())
    return LoadedBackbone(model.eval(), fresh, drawn, count)


def read_config(backbone: Backbone) -> Any:
    """The backbone's configuration as transformers understands it.

    Raises:
        BackboneError: transformers does not know this architecture, or timm is not installed.
    """
    import transformers

    import fedgraft.common.backbones.cifar_resnet  # noqa: F401  # an architecture by its name

    if "pretrained_cfg" in backbone.config and not find_spec("timm"):
        raise BackboneError(
            f"{backbone.source} is a model of timm, which is not installed here",
            hint='pip install "fedgraft[timm]"',
        )
    try:
        return transformers.AutoConfig.from_pretrained(
            backbone.folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # hostile configs raise almost anything
        raise BackboneError(
            f"{backbone.source}: {_first_line(error)}",
            hint="it must be a model that this version of transformers ships",
        ) from None


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the head's modules: top-level children with parameters beside the backbone's own."""
    if is_timm(model):
        return timm_heads(model)
    body = body_names(model)
    return tuple(
        name
        for name, child in model.named_children()
        # T5 has its table of embeddings beside its encoder: a model begins there.
        if not isinstance(child, nn.Embedding)
        and name not in body
        and any(True for _ in child.parameters())
    )


def body_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules below the head: the child that transformers calls the base model.

    Where there is none (the encoder of Whisper, the vision tower of CLIP), each child that is a
    model of transformers itself.
    """
    prefix = getattr(model, "base_model_prefix", "")
    children = dict(model.named_children())
    if prefix in children:
        return (prefix,)
    return tuple(name for name, child in children.items() if hasattr(child, "base_model_prefix"))


def own_labels(backbone: Backbone) -> list[str | None]:
    """The labels that the head in the backbone's folder was trained for, as its config says."""
    config = backbone.config
    named = config.get("id2label") or dict(enumerate(config.get("label_names") or ()))  # of timm
    by_index = {int(index): name for index, name in named.items()}
    return [by_index.get(index) for index in range(len(by_index))]


def public_source(source: str) -> str:
    """``source`` as it may be shown to others: ``path:NAME`` without folders.

    A backbone that is named by its manifest is what its sender calls it, where it is in the store.
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
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        # Pickles are not even downloaded.
        patterns = [*(f"*{suffix}" for suffix in FINGERPRINTED), "README.md"]  # has the licence
        revised = revision or None
        return Path(snapshot_download(repository, revision=revised, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        raise BackboneError(
            f"cannot fetch hf:{name} ({type(error).__name__})",
            hint="check the name and the network, or copy the folder and use path:DIR",
        ) from None


def _stored(digest: str) -> Path:
    """Every chunk is hashed again: a disk may have changed a bit since it came."""
    store = open_store()
    store.check(store.manifest(digest))
    return store.folder(digest)


def _builtin(name: str) -> Path:
    known = sorted(path.name for path in BUILTIN.iterdir() if path.is_dir())
    if name not in known:
        raise BackboneError(f"no built-in backbone {name}", hint=f"there is: {', '.join(known)}")
    return BUILTIN / name


def _build(backbone: Backbone, task: Task, labels: Sequence[str]) -> tuple[nn.Module, set[str]]:
    """The model and the names of the weights the folder did not have."""
    import transformers

    import fedgraft.common.backbones.cifar_resnet  # noqa: F401  # an architecture by its name

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    auto = getattr(transformers, task.auto_class)
    options = task.model_options(backbone.config, labels, backbone.source)
    try:
        if backbone.weights == "random":
            config = transformers.AutoConfig.from_pretrained(
                backbone.folder, trust_remote_code=False, local_files_only=True, **options
            )
            return auto.from_config(config, trust_remote_code=False).float(), set()
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
    except Exception as error:  # loaders of hostile or torn files raise almost anything
        raise BackboneError(
            f"{backbone.source} cannot be loaded for {task.name}: {_first_line(error)}",
            hint=f"it must be a model that {task.auto_class} can load",
        ) from None
    mismatched = {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
    missing = set(info["missing_keys"]) | mismatched
    _refuse_random_layers(model, missing, backbone.source, task)
    return model, missing


def _refuse_random_layers(model: nn.Module, missing: set[str], source: str, task: Task) -> None:
    """A head that trains may be missing, a pooler often is; another gap would be frozen noise.

    What stands for a hidden patch begins as zeros, which are no noise.
    """
    heads = tuple(f"{name}." for name in head_names(model)) if task.head_trains else ()
    gaps = sorted(
        key
        for key in missing
        if not key.startswith(heads) and not any(one in key for one in (".pooler.", ".mask_token"))
    )
    own = tuple(f"{name}." for name in head_names(model))
    if gaps and all(name.startswith(own) for name in gaps):
        raise task.no_head(source)
    if gaps:
        raise BackboneError(
            f"{source}: {len(gaps)} weights of the backbone are missing or of another shape, "
            f"such as {gaps[0]}",
            hint="config.json and the weights do not belong together: copy the folder again",
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def _head_is_fresh(
    model: nn.Module, missing: set[str], backbone: Backbone, labels: Sequence[str]
) -> bool:
    """Whether the head is not the folder's, or is for other labels; one for tokens has none."""
    if backbone.weights == "random":
        return True
    names = own_labels(backbone)
    heads = tuple(f"{name}." for name in head_names(model))
    other = bool(labels) and names != list(labels)
    return other or any(key.startswith(heads) for key in missing)


def _reset(head: nn.Module, model: nn.Module) -> None:
    """Initialise a head afresh, the way transformers does for this architecture."""
    for parameter in head.parameters():
        parameter._is_hf_initialized = False  # type: ignore[attr-defined]  # set by loading
    initialise = model._init_weights
    for module in head.modules():
        initialise(module)  # type: ignore[operator]
