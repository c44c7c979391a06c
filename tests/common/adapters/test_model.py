"""One model a process: opened once per method, reset by ``put``, equal in every process."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertForSequenceClassification

from fedgraft.common.adapters.attach import read
from fedgraft.common.adapters.model import Workbench, cache_folder, choose_device, open_workbench
from fedgraft.common.config.job import Job
from fedgraft.common.errors import AdapterError, BackboneError, InputError
from fedgraft.common.layout import Layout, Vector, is_factor_a, is_head
from fedgraft.common.messages.codec import array_hash
from fedgraft.common.modalities.image import ImageProcessor
from fedgraft.common.modalities.text import TextProcessor

ROOT = Path(__file__).parents[3]


def job(**sections: dict[str, Any]) -> Job:
    """A job on the built-in backbone, with keys of some sections changed or added."""
    raw: dict[str, dict[str, Any]] = {
        "job": {"name": "t", "task": "image-classification", "labels": list("0123456789")},
        "backbone": {"source": "builtin:glyph-vit"},
        "method": {"kind": "lora", "rank": 2, "head": "shared"},
    }
    for name, keys in sections.items():
        raw[name] = raw.get(name, {}) | keys
    return Job.model_validate(raw)


@pytest.fixture
def bench() -> Workbench:
    opened = open_workbench(job())
    opened.put()
    return opened


def some_vector(layout: Layout, seed: int = 0) -> Vector:
    return np.random.default_rng(seed).standard_normal(layout.size).astype(np.float32)


# --- opening


def test_what_does_not_shape_the_model_opens_the_same_workbench(bench: Workbench) -> None:
    same = job(rounds={"count": 3}, training={"epochs": 9}, simulation={"train": "x"})
    assert open_workbench(same) is bench
    assert open_workbench(same.for_sites()) is bench


@pytest.mark.parametrize(
    "section",
    [
        {"method": {"rank": 3}},
        {"method": {"targets": "all-conv"}},
        {"job": {"seed": 1}},
        {"job": {"labels": list("0123456798")}},
        {"backbone": {"weights": "random"}},
    ],
)
def test_what_shapes_the_model_opens_another(bench: Workbench, section: dict[str, Any]) -> None:
    other = open_workbench(job(**section))
    assert other is not bench
    assert other.layout != bench.layout or not np.array_equal(other.initial, bench.initial)


def test_a_workbench_says_what_it_holds(bench: Workbench) -> None:
    assert bench.own == ()
    assert bench.backbone.source == "builtin:glyph-vit"
    assert bench.backbone_parameters == 227_722
    assert not bench.fresh_head
    assert isinstance(bench.processor, ImageProcessor)
    assert bench.initial.dtype == np.float32
    assert np.array_equal(read(bench.model, bench.layout), bench.initial)


def test_new_labels_make_a_fresh_head() -> None:
    assert open_workbench(job(job={"labels": ["even", "odd"]})).fresh_head


def test_mistakes_in_the_job_come_through_with_their_own_error() -> None:
    with pytest.raises(BackboneError):
        open_workbench(job(backbone={"source": "builtin:nothing"}))
    with pytest.raises(AdapterError):
        open_workbench(job(method={"targets": ["nothing"]}))


@pytest.fixture(scope="module")
def text_source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BERT with a tokenizer; 13 linear layers, more than peft likes to list by name."""
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder)
    words = {"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3}
    Tokenizer(models.WordLevel(words, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}'
    )
    return f"path:{folder}"


PROBE = """
import sys
from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.config.job import Job
from fedgraft.common.messages.codec import array_hash
bench = open_workbench(Job.model_validate_json(sys.argv[1]))
print(bench.layout.fingerprint, bench.backbone.fingerprint, array_hash(bench.initial))
"""


@pytest.mark.slow
def test_another_process_opens_the_very_same_adapter(text_source: str) -> None:
    wanted = job(
        job={"task": "text-classification", "labels": ["good", "bad", "ugly"]},
        backbone={"source": text_source},
    )
    here = open_workbench(wanted)
    assert isinstance(here.processor, TextProcessor)
    rooms = os.pathsep.join(str(ROOT / room) for room in ("common", "client", "server"))
    result = subprocess.run(
        [sys.executable, "-c", PROBE, wanted.model_dump_json()],
        env=os.environ | {"PYTHONPATH": rooms, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    expected = [here.layout.fingerprint, here.backbone.fingerprint, array_hash(here.initial)]
    assert result.stdout.split() == expected


# --- swapping adapters


def test_put_alone_brings_back_the_initial_adapter(bench: Workbench) -> None:
    bench.put((bench.layout, some_vector(bench.layout)))
    assert not np.array_equal(read(bench.model, bench.layout), bench.initial)
    bench.put()
    assert np.array_equal(read(bench.model, bench.layout), bench.initial)


def test_put_forgets_what_the_part_before_left_elsewhere(bench: Workbench) -> None:
    heads = bench.layout.only(name for name in bench.layout.names if is_head(name))
    bench.put((bench.layout, some_vector(bench.layout)))
    bench.put((heads, some_vector(heads, 1)))
    now = read(bench.model, bench.layout)
    for name, where in bench.layout.slices.items():
        if is_head(name):
            assert np.array_equal(now[where], some_vector(heads, 1)[heads.slices[name]])
        else:
            assert np.array_equal(now[where], bench.initial[where])


def test_of_two_parts_the_later_wins(bench: Workbench) -> None:
    heads = bench.layout.only(name for name in bench.layout.names if is_head(name))
    everything, later = some_vector(bench.layout), some_vector(heads, 1)
    bench.put((bench.layout, everything), (heads, later))
    assert np.array_equal(read(bench.model, heads), later)
    bench.put((heads, later), (bench.layout, everything))
    assert np.array_equal(read(bench.model, bench.layout), everything)


def test_a_put_does_not_change_what_initial_means(bench: Workbench) -> None:
    before = bench.initial.copy()
    bench.put((bench.layout, some_vector(bench.layout)))
    assert np.array_equal(bench.initial, before)


def test_initial_of_a_part_is_that_part_of_the_initial_vector(bench: Workbench) -> None:
    part = bench.layout.only(bench.layout.names[1::3])
    assert np.array_equal(bench.initial_of(part), read(bench.model, part))
    assert np.array_equal(bench.initial_of(bench.layout), bench.initial)


def test_initial_of_nothing_is_an_empty_vector(bench: Workbench) -> None:
    nothing = bench.initial_of(bench.layout.only([]))
    assert nothing.shape == (0,)
    assert nothing.dtype == np.float32


@pytest.mark.parametrize(("policy", "stays"), [("shared", False), ("local", True)])
def test_the_head_stays_at_a_site_only_if_its_policy_is_local(policy: str, stays: bool) -> None:
    local = open_workbench(job(method={"head": policy})).local
    heads = [name for name in local.names if is_head(name)]
    assert list(local.names) == heads
    assert bool(heads) == stays
    assert local.size == (970 if stays else 0)


# --- the hash of what does not travel


def test_the_fixed_hash_sees_the_tensors_that_do_not_travel_and_only_those(
    bench: Workbench,
) -> None:
    trained = [name for name in bench.layout.names if not is_factor_a(name)]
    expected = bench.fixed_hash(trained)
    for name in (bench.layout.names[0], bench.layout.names[-1]):
        changed = bench.initial.copy()
        changed[bench.layout.slices[name].stop - 1] += 1
        other = dataclasses.replace(bench, initial=changed)
        assert (other.fixed_hash(trained) != expected) == is_factor_a(name)


def test_the_fixed_hash_is_of_the_initial_values_whatever_was_put_since(bench: Workbench) -> None:
    trained = [name for name in bench.layout.names if not is_factor_a(name)]
    before = bench.fixed_hash(iter(trained))
    bench.put((bench.layout, some_vector(bench.layout)))
    assert bench.fixed_hash(trained) == before
    assert bench.fixed_hash(trained[1:]) != before
    assert bench.fixed_hash(bench.layout.names) == array_hash()


def test_sites_with_another_seed_have_another_fixed_hash(bench: Workbench) -> None:
    trained = [name for name in bench.layout.names if not is_factor_a(name)]
    other = open_workbench(job(job={"seed": 5}))
    assert other.layout == bench.layout
    assert other.fixed_hash(trained) != bench.fixed_hash(trained)


# --- devices and folders


def test_the_cpu_is_always_there_and_auto_takes_something_that_is() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert torch.zeros(1, device=choose_device("auto")).item() == 0


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_an_error_that_names_those_that_are(name: str) -> None:
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if present[name]:
        assert choose_device(name).type == name
        return
    with pytest.raises(InputError, match=name) as caught:
        choose_device(name)
    assert "cpu" in caught.value.hint
    assert name not in caught.value.hint


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDGRAFT_CACHE", "/somewhere/else")
    assert cache_folder() == Path("/somewhere/else")
    for unset in (None, ""):
        if unset is None:
            monkeypatch.delenv("FEDGRAFT_CACHE")
        else:
            monkeypatch.setenv("FEDGRAFT_CACHE", unset)
        assert cache_folder() == Path.home() / ".cache" / "fedgraft"
