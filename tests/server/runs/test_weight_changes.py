"""What moved is what merging adds to the weights, module by module."""

import numpy as np
import pytest
import torch
from support.trainings import noisy, open_small

from fedgraft.server.runs.weight_changes import moved_modules


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["vit", "resnet", "bert", "gpt2"])
def test_the_change_of_a_module_is_what_merging_adds_to_it(kind: str, dora: bool) -> None:
    import copy

    bench = open_small(kind, dora=dora).bench
    vector = noisy(bench)
    found = {one.module: one for one in moved_modules(bench, (bench.layout, vector))}
    before = {
        name.replace("base_layer.", ""): weight.detach().clone()
        for name, weight in bench.model.get_base_model().named_parameters()
        if "lora_" not in name and "modules_to_save" not in name
    }
    merged = copy.deepcopy(bench.model).merge_and_unload()
    checked = 0
    for name, weight in merged.named_parameters():
        module = name.removesuffix(".weight")
        if module not in found or not found[module].low_rank:
            continue
        start = before[name].double()
        change = float((weight.detach().double() - start).norm())
        assert found[module].change == pytest.approx(change, rel=1e-3)
        assert found[module].relative == pytest.approx(change / float(start.norm()), rel=1e-3)
        checked += 1
    assert checked == sum(one.low_rank for one in found.values()) > 1


@pytest.mark.parametrize("kind", ["vit", "resnet", "bert"])
def test_weights_of_the_backbone_that_train_moved_from_where_they_were(kind: str) -> None:
    bench = open_small(kind, kind="partial", blocks=1, biases=True, head="shared").bench
    vector = noisy(bench)
    found = moved_modules(bench, (bench.layout, vector))
    assert not any(one.low_rank or "modules_to_save" in one.module for one in found)
    total = sum(one.change**2 for one in found) ** 0.5
    assert total == pytest.approx(float(np.linalg.norm(vector - bench.initial)), rel=1e-4)
    assert len(found) > 4 and all(one.change > 0 for one in found)


def test_the_norm_is_that_of_scaling_times_b_times_a() -> None:
    bench = open_small("vit").bench
    vector = noisy(bench)
    (first, *_) = moved_modules(bench, (bench.layout, vector))
    stem = f"base_model.model.{first.module}"
    factors = {}
    for name, shape in zip(bench.layout.names, bench.layout.shapes, strict=True):
        if name.startswith(f"{stem}.lora_"):
            factors[name.split(".lora_")[1][0]] = vector[bench.layout.slices[name]].reshape(shape)
    config = bench.model.peft_config["default"]
    product = config.lora_alpha / config.r * factors["B"].astype(float) @ factors["A"]
    assert first.change == pytest.approx(float(np.linalg.norm(product)), rel=1e-5)


def test_an_adapter_at_its_start_moved_nothing_and_a_head_moves_from_where_it_started() -> None:
    bench = open_small("vit").bench
    assert all(one.change == 0 for one in moved_modules(bench))
    heads = [name for name in bench.layout.names if ".modules_to_save." in name]
    vector = bench.initial.copy()
    for name in heads:
        vector[bench.layout.slices[name]] *= 3
    moved = [one for one in moved_modules(bench, (bench.layout, vector)) if one.change]
    assert [one.low_rank for one in moved] == [False]
    assert moved[0].relative == pytest.approx(2.0)
    assert "modules_to_save" not in moved[0].module and torch.is_grad_enabled()
