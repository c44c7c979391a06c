"""Language models from text files to an export, and what people are shown of them."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from support.federations import adapter_of
from support.language_models import CHARACTERS, job_settings, save_language_model
from support.matrix import thinned

from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.config.jobfile import parse_job
from fedgraft.common.console import Console
from fedgraft.common.errors import DataError
from fedgraft.common.tasks import TASKS
from fedgraft.server.export.adapter import export_merged
from fedgraft.server.plan import make_plan
from fedgraft.server.runs.run_folder import Run
from fedgraft.simulations.preparation import prepare
from fedgraft.simulations.simulate import simulate

WORDS = ["the cat", "a dog", "sees", "runs. ", "but", "why", "to be", "or not"]


def documents(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(2, 30))) for _ in range(count)]


def write_site(folder: Path, kind: str, seed: int) -> str:
    """A site's files of one kind; what of a pattern stands behind the site's name."""
    folder.mkdir(parents=True)
    texts = documents(12, seed)
    if kind == "txt":
        for number, text in enumerate(texts):
            (folder / f"{number:02d}.txt").write_text(text)
        return ""
    rows = [{"text": text, "target": text[:6].upper()} for text in texts]
    if kind == "csv":
        lines = ["text,target", *(f'"{row["text"]}",{row["target"]}' for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    (folder / f"train.{kind}").write_text("\n".join(lines) + "\n")
    return f"/train.{kind}"


def run_job(
    tmp_path: Path,
    model: str,
    files: str,
    *,
    names: str = "xy",
    masked: bool = False,
    method: dict[str, Any] | None = None,
    **changes: Any,
) -> tuple[Run, dict[str, Any]]:
    backbone = save_language_model(model, tmp_path / "backbone")
    ends = [write_site(tmp_path / "sites" / name, files, at) for at, name in enumerate(names)]
    raw = job_settings(model, backbone, f"{tmp_path}/sites/*{ends[0]}")
    raw["simulation"] |= changes
    raw["method"] = method or raw["method"]
    raw["privacy"] = {"secure_aggregation": {"enabled": masked, "max_sites": 4, "max_weight": 500}}
    job = parse_job(raw, where="test")
    prepared = prepare(job)
    with Run.create(tmp_path / "runs", job) as run:
        return run, simulate(prepared, run, Console(quiet=True))


@torch.inference_mode()
def logits_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    found: torch.Tensor = model.eval()(**inputs).logits
    return found.clone()


PARTIAL = {"kind": "partial", "blocks": 1, "norms": True, "head": "frozen"}


@pytest.mark.parametrize(
    ("model", "files", "method"),
    thinned(
        [
            ("gpt2", "txt", None),
            ("llama", "csv", None),
            ("gpt2", "jsonl", PARTIAL),
            ("bert", "txt", None),
            ("bert", "csv", PARTIAL),
            ("t5", "jsonl", None),
            ("t5", "csv", PARTIAL),
        ],
        7,
    ),
)
def test_two_rounds_are_trained_shown_and_given_away(
    model: str, files: str, method: dict[str, Any] | None, tmp_path: Path
) -> None:
    run, summary = run_job(tmp_path, model, files, method=method)
    final = summary["final"]
    assert final["head_only"] is None  # there is no other head
    assert final["federated"]["perplexity"] < final["zero_shot"]["perplexity"]
    for site in summary["sites"]:
        low, high = site["federated"]["perplexity_interval"]
        assert low <= site["federated"]["perplexity"] <= high
        assert re.search(r"perplexity [\d.]+ federated|perplexity [\d.]+ instead", site["verdict"])
        assert "nats a token" in site["verdict"] and set(site["comparisons"]) == {
            "local_only",
            "zero_shot",
        }

    page = (run.folder / "report.html").read_text(encoding="utf-8")
    shown = f"{final['federated']['perplexity']:.2f}"
    assert f'<dd class="value">{shown}</dd>' in page and "Token accuracy" in page
    assert "macro F1" not in page and "McNemar" not in page
    card = (run.folder / "adapter" / "README.md").read_text(encoding="utf-8")
    assert f"| federated | {shown} (" in card and "macro F1" not in card

    job = run.job
    bench = open_workbench(job)
    exchanged, adapter = make_plan(job, bench, run.session).exchanged, adapter_of(run)
    ids = torch.tensor([[CHARACTERS.index(one) for one in "to be or not"]])
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids[:, :5]} if model == "t5" else {})}
    bench.put()
    untrained = logits_of(bench.model, inputs)
    bench.put((exchanged, adapter))
    wanted = logits_of(bench.model, inputs)
    bench.put()
    assert not torch.allclose(wanted, untrained, atol=1e-3), "it did not train"
    auto = getattr(transformers, TASKS[job.job.task].auto_class)
    plain = auto.from_pretrained(tmp_path / "backbone")
    loaded = PeftModel.from_pretrained(plain, run.folder / "adapter")
    torch.testing.assert_close(logits_of(loaded, inputs), wanted, atol=1e-5, rtol=1e-4)
    export_merged(run, bench, exchanged, adapter, tmp_path / "merged")
    merged = auto.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged, inputs), wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("model", thinned(["gpt2", "bert", "t5"], 3))
def test_workers_do_not_change_a_bit(model: str, tmp_path: Path) -> None:
    plain: dict[str, Any] = {"baselines": [], "finetune_epochs": 0}
    none, two = (
        adapter_of(run_job(tmp_path / str(count), model, "jsonl", workers=count, **plain)[0])
        for count in (0, 2)
    )
    assert np.array_equal(none, two)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["t5", "bert", "gpt2"])
def test_only_masked_sums_are_enough(model: str, tmp_path: Path) -> None:
    """Losses and counts of tokens go through the secure sum, and come to what they are."""
    plain: dict[str, Any] = {"baselines": [], "finetune_epochs": 0}
    clear, masked = (
        run_job(tmp_path / str(on), model, "jsonl", names="xyz", masked=on, **plain)[0]
        for on in (False, True)
    )
    for before, after in zip(clear.history(), masked.history(), strict=True):
        for key in ("perplexity", "accuracy"):
            assert after["validation"][key] == pytest.approx(before["validation"][key], rel=1e-3)


@pytest.mark.slow
def test_the_table_shows_perplexity(tmp_path: Path) -> None:
    run, summary = run_job(tmp_path, "gpt2", "txt", baselines=["local_only"], finetune_epochs=0)
    shown = subprocess.run(
        [sys.executable, "-m", "fedgraft", "simulate", "--resume", str(run.folder)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "Perplexity on each site's own test set, and" in shown
    pooled = next(line for line in shown.splitlines() if " pooled " in line)
    assert f"{summary['final']['federated']['perplexity']:.2f}" in pooled
    assert f"{summary['final']['local_only']['perplexity']:.2f}" in pooled


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", "", "line 1: no text"),
        ("a.jsonl", '{"body": "to be"}\n', "no column 'text'"),
        ("a.csv", "text\n", "has no rows"),
    ],
)
def test_a_bad_file_leaves_no_run(name: str, content: str, told: str, tmp_path: Path) -> None:
    backbone = save_language_model("gpt2", tmp_path / "backbone")
    for site in "xy":
        (tmp_path / site).mkdir()
        (tmp_path / site / name).write_text(content)
    job = parse_job(job_settings("gpt2", backbone, f"{tmp_path}/?/{name}"), where="test")
    with pytest.raises(DataError, match=told) as caught:
        prepare(job)
    assert caught.value.hint
