"""Refusals that several tasks share, by the names of features in ``config/compatibility.py``."""

from collections.abc import Mapping
from types import MappingProxyType

from fedgraft.common.modalities import MODALITIES, Modality
from fedgraft.common.section import Refuses

__all__ = ["other_augmentations", "without_classes"]


def _augmentations() -> Mapping[str, str]:
    """Return the features of augmentation, by the names of their modalities."""
    return {name: f"augmentation.{name}" for name, one in MODALITIES.items() if one.augmented}


def other_augmentations(modality: Modality) -> Refuses:
    """Return the refusals of other modalities' augmentations, which mean nothing for ``modality``.

    A modality can also have no augmentation of its own.
    """
    hint = f"training.augmentation.{modality.name}" if modality.augmented else modality.unvaried
    return {
        feature: (f"training.{feature} means nothing for {{task}}", hint)
        for name, feature in _augmentations().items()
        if name != modality.name
    }


def without_classes(parts: str, *, more: Refuses = MappingProxyType({})) -> Refuses:
    """Return the refusals of tasks whose examples have no class: no label of the job for each.

    ``parts`` is the word for what is predicted; ``more`` are further refusals of one task, and
    replace the ones here.
    """
    augmented = {
        feature: (
            f"training.{feature} is for classifications, not for {{task}}",
            "leave training.augmentation out",
        )
        for feature in _augmentations().values()
    }
    return {
        "counts_beside": (
            f"{{task}} predicts {parts}, and counts neither scores nor groups of them",
            "leave evaluation.score_bins, data.group and data.groups out",
        ),
        "heads": ("{task} has no labels to divide into heads", "leave job.heads out"),
        "distillation": (
            f"what a teacher says of all {parts} of {{task}} would not fit on a site's disk",
            "leave training.distillation out",
        ),
        "dirichlet": (
            'partition.kind = "dirichlet" deals labels unevenly, and {task} has none',
            'simulation.partition = {{ kind = "natural" }}, one file or folder a site, or "iid"',
        ),
        "wrong_labels": (
            'faults.poison = "labels" gives sites wrong labels, and {task} has none',
            'simulation.faults.poison = "sign-flip", "noise" or "nan"',
        ),
        "domain": ("{task} has no labels that could be missing", "leave training.domain out"),
        "selection": (
            "{task} has no labels to score a backbone by",
            "a classification job; or compare runs with `fedgraft sweep`",
        ),
        "explanation": ("{task} has no explanations", "text- or image-classification"),
        **augmented,
        **more,
    }
