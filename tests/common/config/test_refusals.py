"""What is refused without a word in the file of the task, rule or method."""

from typing import Any, Literal

import pytest
from support.raw_jobs import explained, make

from fedgraft.common.config import jobfile
from fedgraft.common.config.augmentation import Augmentation
from fedgraft.common.config.compatibility import FEATURES, refusal_of
from fedgraft.common.config.sections import WATCHED, EarlyStopping
from fedgraft.common.methods import METHODS, HeadPolicy, MethodSection
from fedgraft.common.modalities import MODALITIES
from fedgraft.common.tasks import TASKS


class Dense(MethodSection):
    """A method that refuses one thing and forgets the rest."""

    refuses = {"domain": ("nothing to align", "no training.domain")}  # noqa: RUF012

    kind: Literal["dense"] = "dense"
    head: HeadPolicy = "shared"
    width: int = 3


@pytest.mark.parametrize("kind", [kind for kind in METHODS if kind != "lora"])
def test_a_method_without_ranks_refuses_those_of_sites(kind: str) -> None:
    simulation = {"train": "x", "ranks": [4]}
    error = explained(method={"kind": kind, "head": "shared"}, simulation=simulation)
    assert "simulation.ranks has 4" in str(error)
    assert f'method.kind = "{kind}" has no rank' in error.hint
    assert make(method={"rank": 8}, simulation=simulation)


def test_so_does_a_method_that_forgets_to() -> None:
    job = make(simulation={"train": "x"}).model_copy(update={"method": Dense()})
    assert Dense.refuses.keys() == {"domain", "larger_ranks"}
    assert MethodSection.refuses.keys() == {"larger_ranks"}
    told = refusal_of(job, "larger_ranks")
    assert told is not None and '"dense" has no rank' in told[1]


def test_keys_of_a_method_are_found_whatever_its_class_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(METHODS, "wide", Dense)
    assert jobfile._known_keys(("method", "wide")) == ["kind", "head", "width"]


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"method": {"kind": "partial", "targets": ["query"]}}, "method.targets"),
        ({"training": {"targets": 3}}, "training.targets"),
    ],
)
def test_only_lora_explains_targets(sections: dict[str, Any], key: str) -> None:
    assert f"unknown key {key}" in str(explained(**sections))


def test_each_modality_with_an_augmentation_has_a_section_and_a_feature() -> None:
    augmented = {name for name, modality in MODALITIES.items() if modality.augmented}
    assert augmented == Augmentation.model_fields.keys()
    assert {f"augmentation.{name}" for name in augmented} <= FEATURES.keys()
    for name, task in TASKS.items():
        refused = {kind for kind in augmented if f"augmentation.{kind}" in task.refuses}
        own = {task.modality.name} if task.labelled else set()
        assert refused == augmented - own, name


def test_early_stopping_knows_which_way_is_better() -> None:
    figures = dict.fromkeys(WATCHED, 0.5)
    better = {key for key in WATCHED if EarlyStopping(metric=key).score(figures) > 0}
    assert better == {"accuracy", "macro_f1", "f1", "r2"}
    assert WATCHED.keys() - better == {"loss", "perplexity", "mae"}


def test_a_metric_of_another_task_is_refused_with_those_there_are() -> None:
    error = explained(rounds={"early_stopping": {"metric": "mae"}})
    assert "text-classification has no mae to stop early by" in str(error)
    assert error.hint == 'rounds.early_stopping.metric = "loss" or "accuracy" or "macro_f1"'
