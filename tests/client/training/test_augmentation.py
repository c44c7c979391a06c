"""What varies, by how much, from whose generator, and that nothing else does."""

import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from support.companies import Company, uneven
from support.federations import digits_job, run_digits
from support.trainings import digits, noisy, open_small, rows_for, settings, task, texts, trained

from fedgraft.client.data.batches import Inputs, as_tensors
from fedgraft.client.model.forward import open_feed
from fedgraft.client.model.randomness import SiteRows
from fedgraft.client.training.augmentation import open_augmentation
from fedgraft.client.training.trainer import Trained, train
from fedgraft.common.config.augmentation import Augmentation
from fedgraft.common.errors import InputError, JobError
from fedgraft.simulations.preparation import prepare

SMALL_SHIFT: dict[str, Any] = {"image": {"flip": True, "shift": 0.1, "rotate": 10, "zoom": 0.1,
                                         "erase": 0.5, "noise": 0.05}}  # fmt: skip
WORDS: dict[str, Any] = {"text": {"hide": 0.2, "swap": 0.3}}
SOUND: dict[str, Any] = {"audio": {"gain": 6, "delay": 0.1, "noise": 0.01}}


def rows(count: int, seed: int = 0) -> SiteRows:
    return SiteRows(count, 0, False, torch.Generator().manual_seed(seed))


def varied(what: dict[str, Any], inputs: Inputs, count: int, seed: int = 0) -> Inputs:
    vary, targets = open_augmentation(Augmentation.model_validate(what)), torch.zeros(count)
    found, same = vary(inputs, targets, rows(count, seed))
    assert same is targets  # what should be predicted does not change
    return found


def pixels(count: int) -> Inputs:
    return as_tensors(digits(count).batch(np.arange(count)))


# Images


def test_half_of_the_images_are_mirrored() -> None:
    before = pixels(40)["pixel_values"]
    after = varied({"image": {"flip": True}}, pixels(40), 40)["pixel_values"]
    mirrored = [torch.equal(one, other.flip(-1)) for one, other in zip(before, after, strict=True)]
    same = [torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    assert all(a or b for a, b in zip(mirrored, same, strict=True))
    assert 10 < sum(mirrored) < 30


@pytest.mark.parametrize(
    "image", [{"shift": 0.2}, {"rotate": 20}, {"zoom": 0.3}, {"erase": 1.0}, {"noise": 0.1}]
)
def test_each_changes_images_and_keeps_their_shape(image: dict[str, float]) -> None:
    before, after = (
        pixels(6)["pixel_values"],
        varied({"image": image}, pixels(6), 6)["pixel_values"],
    )
    assert after.shape == before.shape and after.dtype == before.dtype
    assert all(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert torch.isfinite(after).all()


def test_noise_is_as_strong_as_it_says() -> None:
    before = pixels(200)["pixel_values"]
    after = varied({"image": {"noise": 0.3}}, pixels(200), 200)["pixel_values"]
    assert float((after - before).std()) == pytest.approx(0.3, rel=0.05)


def test_without_kornia_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    with pytest.raises(InputError, match="needs kornia") as caught:
        open_augmentation(Augmentation.model_validate(SMALL_SHIFT))
    assert "fedgraft[augment]" in caught.value.hint
    with pytest.raises(InputError, match="needs kornia"):
        prepare(digits_job("training.augmentation.image={flip=true}"))


# Texts


@given(seed=st.integers(0, 50), left=st.booleans())
@limits(deadline=None)
def test_swapping_loses_no_token_and_hiding_shows_none(seed: int, left: bool) -> None:
    examples = texts(8, seed, pad_left=left)
    before = as_tensors(examples.batch(np.arange(8)))
    after = varied(WORDS, before, 8, seed)
    for row in range(8):
        real = before["attention_mask"][row].bool()
        one, other = before["input_ids"][row][real], after["input_ids"][row][real]
        assert sorted(one.tolist()) == sorted(other.tolist())
        assert (one[0], one[-1]) == (other[0], other[-1])  # marks, or what is read last
        shown = after["attention_mask"][row]
        assert not shown[~real].any()
        assert shown[real][0] == shown[real][-1] == 1


def test_as_many_tokens_are_hidden_as_it_says() -> None:
    before = as_tensors(texts(300, longest=40).batch(np.arange(300)))
    after = varied({"text": {"hide": 0.25}}, before, 300)
    gone = before["attention_mask"].sum() - after["attention_mask"].sum()
    could = (before["attention_mask"].sum(1) - 2).clamp(min=0).sum()
    assert float(gone / could) == pytest.approx(0.25, abs=0.02)
    assert torch.equal(after["input_ids"], before["input_ids"])


# Recordings


def test_sounds_are_louder_later_or_noisier() -> None:
    wave = torch.sin(torch.arange(800.0) / 9).repeat(12, 1)
    louder = varied({"audio": {"gain": 6}}, {"input_values": wave}, 12)["input_values"]
    ratio = louder[:, 1:10].mean(1) / wave[:, 1:10].mean(1)
    assert 0.5 <= float(ratio.min()) < float(ratio.max()) <= 2
    later = varied({"audio": {"delay": 0.1}}, {"input_values": wave}, 12)["input_values"]
    assert any(torch.equal(later[0], wave[0].roll(by)) for by in range(-80, 81))
    noisier = varied({"audio": {"noise": 0.2}}, {"input_values": wave}, 12)["input_values"]
    assert float((noisier - wave).std()) == pytest.approx(0.2, rel=0.05)
    bands = torch.zeros(3, 4, 10)
    bands[..., 0] = 1
    found = varied({"audio": {"delay": 0.3, "gain": 9}}, {"input_features": bands}, 3)
    assert torch.equal(found["input_features"].sum(-1), torch.ones(3, 4))


# In training


@pytest.mark.parametrize("what", [SMALL_SHIFT, WORDS, SOUND], ids=["image", "text", "audio"])
def test_only_real_rows_change_and_the_same_draws_do_the_same(what: dict[str, Any]) -> None:
    made: dict[str, Inputs] = {
        "image": pixels(6),
        "text": as_tensors(texts(6).batch(np.arange(6))),
        "audio": {"input_values": torch.linspace(0, 1, 600).view(6, 100)},
    }
    inputs = made[next(iter(what))]
    one, other = varied(what, inputs, 4, seed=7), varied(what, inputs, 4, seed=7)
    wider = varied(what, {k: v[:4] for k, v in inputs.items()}, 4, seed=7)
    for name, before in inputs.items():
        assert torch.equal(one[name], other[name])
        assert torch.equal(one[name][:4], wider[name])
        assert torch.equal(one[name][4:], before[4:])
    assert any(not torch.equal(one[name][:4], before[:4]) for name, before in inputs.items())


@pytest.mark.parametrize(("kind", "what"), [("deep-vit", SMALL_SHIFT), ("bert", WORDS)])
def test_company_makes_no_difference(kind: str, what: dict[str, Any]) -> None:
    wanted = settings(augmentation=what, epochs=2, accumulation=2)
    Company(open_small(kind, dropout=0.2), uneven(kind), wanted).check()


@pytest.mark.parametrize(("kind", "what"), [("deep-vit", SMALL_SHIFT), ("bert", WORDS)])
def test_every_epoch_is_another_and_evaluation_is_not(kind: str, what: dict[str, Any]) -> None:
    stack, examples = open_small(kind, kind="head"), rows_for(kind, 20)
    layout = stack.bench.layout
    plain = trained(stack, examples, settings(epochs=2, learning_rate=1e-9))
    mixed = trained(stack, examples, settings(epochs=2, learning_rate=1e-9, augmentation=what))
    assert plain.loss != pytest.approx(mixed.loss, abs=1e-4)
    assert open_feed(stack, layout, examples, None).prefix is not None
    assert open_feed(stack, layout, examples, None, varied=True).prefix is None
    assert np.abs(mixed.vector - noisy(stack.bench)).max() < 1e-6


def test_pytorchs_own_generator_is_left_as_it_was() -> None:
    before = torch.random.get_rng_state()
    stack = open_small("deep-vit")
    wanted = settings(augmentation=SMALL_SHIFT)
    (came,) = train(
        stack, stack.bench.layout, [task(digits(), noisy(stack.bench))], settings=wanted
    )
    assert isinstance(came, Trained)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.slow
def test_a_federation_runs_with_it(tmp_path: Any) -> None:
    run, _ = run_digits(tmp_path, "training.augmentation.image={shift=0.1}", "rounds.count=1")
    assert run.history()[0]["sites"] == 3


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (("training.augmentation.text={hide=0.1}",), "means nothing for image-classification"),
        (("training.augmentation={}",), "varies nothing"),
        (("training.augmentation.image={flip=false}",), "varies nothing"),
        (("training.augmentation.image={shift=2}",), "shift"),
    ],
)
def test_what_means_nothing_is_refused(overrides: tuple[str, ...], why: str) -> None:
    with pytest.raises(JobError, match=why):
        digits_job(*overrides)
