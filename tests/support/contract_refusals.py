"""How a job asks for each feature that may be refused, and whether it then is."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from fedgraft.common.config.compatibility import FEATURES, refusal_of
from fedgraft.common.config.job import Job
from fedgraft.common.errors import JobError
from fedgraft.common.section import Refuses

__all__ = ["ASKS", "VERBS", "check_asked", "check_texts", "merged"]

VERBS = {"selection", "explanation"}
"""What no job asks for: ``fedgraft select`` and ``fedgraft explain`` do."""

DORA = {"kind": "lora", "rank": 2, "head": "frozen", "dora": True}


def _augment(kind: str, **how: Any) -> dict[str, Any]:
    return {"training": {"augmentation": {kind: how}}}


ASKS: dict[str, Mapping[str, Any]] = {
    "counts_beside": {"evaluation": {"score_bins": 10}},
    # A job with labels divides its own labels; heads of other labels are refused anyway.
    "heads": {"job": {"heads": {"all": ["no", "yes"]}}},
    "label_smoothing": {"training": {"label_smoothing": 0.1}},
    "trained_head": {"method": {"head": "shared"}},
    "head_dropout": {"training": {"dropout": 0.1}},
    "distillation": {"training": {"distillation": {}}, "simulation": {"teacher": "path:teacher"}},
    "early_stopping": {"rounds": {"early_stopping": {}}},
    "dirichlet": {"simulation": {"partition": {"kind": "dirichlet"}, "sites": 2}},
    "wrong_labels": {"simulation": {"faults": {"poisoned": 0.5, "poison": "labels"}}},
    "domain": {"training": {"domain": {"kind": "coral"}}},
    "consolidation": {"training": {"consolidation": {}}},
    "augmentation.image": _augment("image", flip=True),
    "augmentation.text": _augment("text", hide=0.1),
    "augmentation.audio": _augment("audio", gain=1.0),
    "start": {"start": {"adapter": "adapter"}},
    "no_factors": {"method": {"kind": "head"}},
    "magnitudes": {"method": DORA},
    "quantized_magnitudes": {"method": DORA, "backbone": {"quantize": "8bit"}},
    "larger_ranks": {"simulation": {"ranks": [512]}},
    "secure_aggregation": {"privacy": {"secure_aggregation": {"enabled": True}}},
}
"""Settings over those of any job, by the feature that they ask for."""


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``over`` in it, section by section; one of another kind comes as a whole."""
    found = dict(base)
    for key, value in over.items():
        inside = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        inside = inside and value.get("kind") in (None, found[key].get("kind"))
        found[key] = merged(found[key], value) if inside else value
    return found


def check_texts(refuses: Refuses, job: Job) -> None:
    """Check that all that is refused is a feature, and that ``job`` can be told why."""
    assert refuses.keys() <= FEATURES.keys()
    for feature in refuses:
        told = refusal_of(job, feature)
        assert told is not None, feature
        for text in told:
            assert text and not re.search(r"\{\w*\}|\{\{|\}\}", text), (feature, text)


def check_asked(refuses: Refuses, make: Callable[[Mapping[str, Any]], Job]) -> None:
    """Check that ``make`` of settings that ask for what is refused gives no job, but the reason."""
    job = make({})
    for feature in refuses.keys() - VERBS:
        asked = dict(ASKS[feature])
        if feature == "heads" and job.job.labels:
            asked = {"job": {"heads": {"all": list(job.job.labels)}}}
        with pytest.raises(JobError) as caught:
            make(asked)
        what = refuses[feature][0].partition("{")[0]
        own = feature != "heads" or job.job.labels
        assert caught.value.hint, feature
        assert not own or what in str(caught.value), feature
