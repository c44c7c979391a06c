"""Small jobs with some keys changed, and why a job is refused."""

from typing import Any

import pytest
from pydantic import ValidationError

from fedgraft.common.config.job import Job
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.errors import JobError

__all__ = ["Raw", "explained", "make", "masked", "raw_job", "refusal"]


Raw = dict[str, Any]


def raw_job(**sections: Raw) -> Raw:
    """A small valid job, with keys of some sections changed or added."""
    raw: Raw = {
        "job": {"name": "tiny", "task": "text-classification", "labels": ["yes", "no"]},
        "backbone": {"source": "builtin:glyph-vit"},
        "method": {"kind": "lora", "head": "shared"},
    }
    for name, keys in sections.items():
        raw[name] = raw.get(name, {}) | keys
    return raw


def make(**sections: Raw) -> Job:
    return Job.model_validate(raw_job(**sections))


def refusal(**sections: Raw) -> str:
    """Why this job is refused, in one text."""
    with pytest.raises(ValidationError) as caught:
        make(**sections)
    return str(caught.value)


def explained(**sections: Raw) -> JobError:
    """The same as a person meets it."""
    with pytest.raises(JobError) as caught:
        parse_job(raw_job(**sections), where="job.toml")
    return caught.value


def masked(**keys: object) -> Raw:
    """A ``[privacy]`` section with secure aggregation."""
    return {"secure_aggregation": {"enabled": True, **keys}}
