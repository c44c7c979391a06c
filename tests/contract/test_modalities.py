"""What every modality must do: refuse what cannot be read, and give what models read."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as hf
from support.contract_rows import draw_content
from support.contract_tasks import BACKBONES, save_settings
from support.families import FAMILIES

from fedgraft.client.data.cache import Keeper
from fedgraft.client.data.rows import KINDS, Columns
from fedgraft.common.encoding import Settings
from fedgraft.common.errors import DataError, InputError
from fedgraft.common.examples import Examples
from fedgraft.common.modalities import MODALITIES, Modality, Processor
from fedgraft.server.export.attribution import EXPLAINERS

SETTINGS = Settings(max_length=16, seconds=0.25)
KNOWN: list[tuple[str, Callable[[], Any]]] = [
    *BACKBONES,
    # One gets a mask that marks the padding of a recording; another reads spectrograms.
    *((FAMILIES[name][2], FAMILIES[name][0]) for name in ("wav2vec2", "whisper", "clip")),
]
JUNK: tuple[Any, ...] = (None, {"bytes": b"junk", "path": None}, {"bytes": None, "path": "nowhere"})
NO_VALUES: tuple[Any, ...] = (None, "", " \n", 3, ["a"], b"a", "\ud800")


@dataclass
class Reader:
    """A modality with a backbone that reads it."""

    modality: Modality
    config: Any
    folder: Path

    @cached_property
    def processor(self) -> Any:
        """What its rows go through."""
        return self.load()

    def load(self) -> Any:
        """Another of them."""
        return self.modality.load(self.folder, self.config)

    @property
    def config_of_pixels(self) -> Any:
        """The part of the configuration that is about pixels."""
        return getattr(self.config, "vision_config", self.config)

    @cached_property
    def contents(self) -> list[Any]:
        """A few cells."""
        draw = np.random.default_rng(0)
        places = (self.folder / "made" / str(at) for at in range(5))
        return [draw_content(self.modality, draw, place) for place in places]

    def encode(self, contents: list[Any]) -> Examples:
        """The examples of some cells."""
        features = datasets.Features({self.modality.name: KINDS[self.modality.kind]})
        rows = datasets.Dataset.from_dict({self.modality.name: contents}, features)
        labels = np.arange(len(contents), dtype=np.int64)
        return self.modality.encode(
            Columns(rows), labels, self.processor, SETTINGS, Keeper(None, "")
        )


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((name, make), id=f"{name}-{type(make()).__name__}")
        for name in MODALITIES
        for reads, make in KNOWN
        if reads == name
    ],
)
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """Each modality with each kind of backbone that reads it."""
    name, make = request.param
    folder, config = tmp_path_factory.mktemp(name), make()
    save_settings(config, folder, words=not MODALITIES[name].files)
    return Reader(MODALITIES[name], config, folder)


def test_each_modality_has_a_backbone_here() -> None:
    assert set(MODALITIES) == {reads for reads, _ in KNOWN}
    for name, modality in MODALITIES.items():
        assert modality.name == name and modality.kind in KINDS
        assert modality.several and modality.one_file
        assert modality.augmented or modality.unvaried


def test_a_bad_cell_is_refused(reader: Reader) -> None:
    for content in reader.contents:
        reader.modality.check(content)
    for bad in JUNK if reader.modality.files else NO_VALUES:
        with pytest.raises(DataError) as caught:
            reader.modality.check(bad)
        assert str(caught.value) and caught.value.hint, bad


def test_a_cell_becomes_the_same_whatever_its_company(reader: Reader) -> None:
    examples = reader.encode(reader.contents)
    assert len(examples) == len(reader.contents)
    assert examples.labels.tolist() == list(range(len(examples)))
    turned = reader.encode(reader.contents[::-1])
    assert examples.subset(np.arange(len(examples))[::-1]).digest == turned.digest
    width = examples.longest
    for at, content in enumerate(reader.contents):
        alone = reader.encode([content]).batch(np.arange(1), width)
        for name, values in examples.batch(np.array([at]), width).items():
            np.testing.assert_array_equal(values, alone[name], err_msg=name)


def test_all_of_a_cell_is_read(reader: Reader) -> None:
    """Every colour of a picture reaches the model, as itself; every value is a number."""
    examples = reader.encode(reader.contents)
    for name, values in examples.batch(np.arange(len(examples)), examples.longest).items():
        assert np.isfinite(values).all(), name
        assert name.endswith("mask") or np.ptp(values) > 0 or "type_ids" in name, name
        if name == "pixel_values":
            colours = np.moveaxis(values, -3, 0)  # [colours, ...] of images and of clips
            assert len(colours) == reader.config_of_pixels.num_channels
            for at, one in enumerate(colours):
                assert one.std() > 0.1, f"colour {at} is blank"
                assert not any(np.array_equal(one, other) for other in colours[:at])


def test_a_blank_example_is_as_large_as_a_real_one(reader: Reader) -> None:
    examples = reader.encode(reader.contents)
    real = examples.batch(np.arange(len(examples)), examples.longest)
    blank = reader.processor.blank(SETTINGS)
    assert blank.keys() == real.keys()
    for name, values in blank.items():
        assert (1, *values.shape[1:]) == (1, *real[name].shape[1:]), name
        assert len(values) == 1 and values.dtype == real[name].dtype, name


def test_a_processor_is_known_by_what_it_does(reader: Reader) -> None:
    first, second = reader.load(), reader.load()
    assert first.identity == second.identity == reader.processor.identity
    assert len(first.identity) == 64
    reader.encode(reader.contents)
    assert reader.processor.identity == first.identity, "it changed by being used"
    described = first.describe(SETTINGS)
    assert not described or described.endswith(".")


def test_identities_differ(tmp_path: Path) -> None:
    """Backbones that prepare cells in different ways do not share what is kept."""
    found: dict[str, list[str]] = {name: [] for name in MODALITIES}
    for number, (reads, make) in enumerate(KNOWN):
        folder, config = tmp_path / str(number), make()
        save_settings(config, folder, words=not MODALITIES[reads].files)
        processor: Processor = MODALITIES[reads].load(folder, config)
        found[reads].append(processor.identity)
    for name, identities in found.items():
        assert len(identities) == 1 or len(set(identities)) > 1, name
    every = [identity for identities in found.values() for identity in set(identities)]
    assert len(set(every)) == len(every)


def test_samples_are_what_a_model_accepts_or_are_refused(reader: Reader) -> None:
    config, draw = reader.config, np.random.default_rng(0)
    reader.processor.configure(config)
    if type(reader.modality).samples is Modality.samples:
        assert reader.modality.name not in EXPLAINERS, "what is explained can be exported"
        with pytest.raises(InputError) as caught:
            reader.modality.samples(reader.processor, config, SETTINGS, draw, (2, 12))
        assert caught.value.hint
        return
    if getattr(config, "is_encoder_decoder", False) and not reader.modality.files:
        return  # it wants a second text, which belongs to a task
    for shape in ((2, 12), (1, 7), (5, 16)):
        samples = reader.modality.samples(reader.processor, config, SETTINGS, draw, shape)
        assert {len(values) for values in samples.values()} == {shape[0]}
        model = hf.AutoModel.from_config(reader.config_of_pixels).eval()
        with torch.inference_mode():
            found = model(**{name: torch.from_numpy(values) for name, values in samples.items()})
        assert bool(found[0].isfinite().all())
        examples = reader.encode(reader.contents)
        real = examples.batch(np.arange(2), examples.longest)
        assert samples.keys() == real.keys()
        for name, values in samples.items():
            assert values.dtype == real[name].dtype, name
