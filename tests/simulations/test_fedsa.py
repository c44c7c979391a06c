"""The rule fedsa: factors A are everybody's, and each site keeps its own B."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.federations import adapter_of, digits_job, run_digits, write_digits

from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.errors import JobError
from fedgraft.common.layout import is_factor_a, is_factor_b, is_head
from fedgraft.server.plan import make_plan
from fedgraft.server.runs.run_folder import Run

FEDSA = ("aggregation.rule=fedsa", "rounds.count=3", "simulation.finetune_epochs=0")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any]]:
    return run_digits(tmp_path_factory.mktemp("runs"), *FEDSA, 'simulation.baselines=["zero_shot"]')


def own_factors(run: Run, site: str) -> np.ndarray[Any, Any]:
    """The factors B that a site has kept of the last round."""
    kept = sorted((run.folder / "sites" / site).rglob("*.safetensors"))
    return np.asarray(load_file(kept[-1])["head"])


def test_only_factors_a_and_the_head_travel(finished: tuple[Run, dict[str, Any]]) -> None:
    run, summary = finished
    bench = open_workbench(run.job)
    plan = make_plan(run.job, bench, run.session)
    assert all(is_factor_a(name) or is_head(name) for name in plan.exchanged.names)
    assert bench.own and all(map(is_factor_b, bench.own))
    assert adapter_of(run).shape == (plan.exchanged.size,)
    assert summary["trained_parameters"] == bench.layout.size


def test_sites_come_to_factors_of_their_own(finished: tuple[Run, dict[str, Any]]) -> None:
    run, summary = finished
    names = [site["name"] for site in summary["sites"]]
    factors = [own_factors(run, name) for name in names]
    assert all(one.any() for one in factors)
    assert not np.allclose(factors[0], factors[1])
    assert summary["final"]["federated"]["accuracy"] > summary["final"]["zero_shot"]["accuracy"]


def test_what_is_given_away_says_what_it_lacks(finished: tuple[Run, dict[str, Any]]) -> None:
    run, summary = finished
    card = (run.folder / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "Only the factors A were shared" in re.sub(r"\s+", " ", card)
    given = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    factors = [value for name, value in given.items() if "lora_B" in name]
    assert factors and not any(value.any() for value in factors)
    assert summary["moved"] and not any(one["low_rank"] for one in summary["moved"])


@pytest.mark.slow
def test_masked_it_comes_to_the_same(tmp_path: Path) -> None:
    rows = write_digits(tmp_path / "digits", 80, 30)
    plain = (*FEDSA, *rows, "simulation.baselines=[]", "simulation.sites=4", "rounds.count=1")
    masked = "privacy.secure_aggregation={enabled=true, max_weight=64}"
    clear, summed = (run_digits(tmp_path / str(n), *plain, *more)[0]
                     for n, more in enumerate(((), (masked,))))  # fmt: skip
    np.testing.assert_allclose(adapter_of(summed), adapter_of(clear), atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("method.dora=true",), "DoRA's magnitudes"),
        (("method.kind=head",), "no such pairs"),
        (("rounds.early_stopping.metric=loss",), "own factors do not go back"),
        (("training.consolidation={}",), "consolidation holds all"),
        (("start.adapter=/nowhere",), "would be lost"),
    ],
)
def test_what_does_not_go_with_it_is_refused(overrides: tuple[str, ...], told: str) -> None:
    with pytest.raises(JobError, match=told) as caught:
        digits_job("aggregation.rule=fedsa", *overrides)
    assert caught.value.hint
