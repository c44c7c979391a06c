"""One simulation as ``engine.py`` measures it: the product's own way through, figures as JSON.

Beside the peer (``--like-the-peer``) two things are set so that both compute the same: batches in
the order of the rows instead of a shuffled one, and the initial adapter of the peer's seeds. All
else is what `fedgraft simulate` does with the job that is written here.
"""

import argparse
import json
import os
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

STARTED = time.time()
ROWS = 32  # examples of a site

os.environ["TOKENIZERS_PARALLELISM"] = "false"


def write_rows(data: Path, folder: Path, sites: int) -> None:
    """A file for each site: ``ROWS`` rows of the data set, site after site, wrapped around."""
    rows = data.read_text(encoding="utf-8").splitlines()
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
    for site in range(sites):
        mine = [rows[(site * ROWS + at) % len(rows)] for at in range(ROWS)]
        (folder / "train" / f"{site:05d}.jsonl").write_text("\n".join(mine) + "\n")
        (folder / "test" / f"{site:05d}.jsonl").write_text(mine[0] + "\n")


def job_of(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The job: LoRA on query and value, as many AdamW steps as the peer takes."""
    layers = range(options.layers - options.top_layers, options.layers)
    targets = [f"layer.{n}.attention.self.{m}" for n in layers for m in ("query", "value")]
    rows = map(json.loads, options.data.read_text(encoding="utf-8").splitlines())
    return {
        "job": {
            "name": "engine",
            "task": "text-classification",
            "labels": sorted({str(row["label"]) for row in rows}),
        },
        "backbone": {"source": f"path:{options.backbone.resolve()}"},
        "method": {
            "kind": "lora",
            "rank": 8,
            "alpha": 16,
            "targets": targets if options.top_layers else ["query", "value"],
            "head": "shared",
        },
        "training": {
            "batch_size": options.batch,
            "learning_rate": 1e-3,
            "weight_decay": 0.01,
            "clip_norm": 0,
            "schedule": {"shape": "constant"},
            "precision": "bf16" if options.bf16 else "fp32",
        },
        "rounds": {"count": options.rounds, "fraction": options.fraction},
        "data": {"validation": 0, "max_length": options.seq},
        "simulation": {
            "train": f"{folder}/train/*.jsonl",
            "test": f"{folder}/test/*.jsonl",
            "partition": {"kind": "natural"},
            "baselines": [],
            "finetune_epochs": 0,
            "sites_per_pass": auto if (auto := options.sites_per_pass) == "auto" else int(auto),
            **({"workers": options.workers} if options.workers is not None else {}),
        },
    }


def like_the_peer(job: Any, seq: int, initial: Path, *, pad: bool) -> None:
    """Batches in the order of the rows, the peer's initial adapter, with ``pad`` its padding."""
    import numpy as np
    import torch

    from fedgraft.client.training import trainer as training
    from fedgraft.common.adapters.model import open_workbench
    from fedgraft.common.examples import TextExamples

    def in_order(examples: Any, generator: Any, epochs: int, settings: Any) -> Any:
        order = np.arange(len(examples))
        for _ in range(epochs):
            yield from np.split(order, range(settings.batch_size, len(order), settings.batch_size))

    training.shuffled = in_order  # type: ignore[attr-defined]
    if pad:
        TextExamples.width = lambda self, index: seq  # type: ignore[method-assign]
    bench = open_workbench(job)
    theirs = torch.load(initial, weights_only=True)
    for name, where in bench.layout.slices.items():
        plain = name.replace(".modules_to_save.default.", ".").replace(".default.", ".")
        bench.initial[where] = theirs[plain].float().numpy().reshape(-1)


def save(adapter: Any, layout: Any, path: Path) -> None:
    """The adapter under the names that peft saves it with."""
    import torch

    tensors = {}
    for (name, where), shape in zip(layout.slices.items(), layout.shapes, strict=True):
        plain = name.replace(".modules_to_save.default.", ".").replace(".default.", ".")
        tensors[plain] = torch.from_numpy(adapter[where].reshape(shape).copy())
    torch.save(tensors, path)


def main() -> None:
    """Run and print one line of JSON."""
    options = read_options()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["FEDGRAFT_CACHE"] = str(folder / "cache")
        write_rows(options.data, folder, options.sites)
        print(json.dumps(run(options, folder)))


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Simulate in ``folder``; what it took."""
    from safetensors.numpy import load_file

    from fedgraft.common.adapters.model import open_workbench
    from fedgraft.common.config.jobfile import parse_job
    from fedgraft.common.console import Console
    from fedgraft.server.runs.run_folder import Run
    from fedgraft.simulations.grid.memory import PeakMemory
    from fedgraft.simulations.preparation import prepare
    from fedgraft.simulations.simulate import simulate

    with PeakMemory() as memory:
        job = parse_job(job_of(options, folder), where="benchmark")
        if options.like_the_peer:
            like_the_peer(job, options.seq, options.like_the_peer, pad=options.pad)
        console = Console(quiet=not options.verbose)
        prepared = prepare(job, console=console)
        ready = time.time()
        with Run.create(folder / "runs", job) as run:
            summary = simulate(prepared, run, console)
    history = run.history()
    ends = [
        datetime.fromisoformat(event["time"]).timestamp()
        for event in run.events()
        if event["event"] == "round"
    ]
    if options.save:
        newest = max((run.folder / "checkpoints").glob("round-*.safetensors"))
        save(load_file(newest)["adapter"], open_workbench(job).layout, options.save)
    trained = [line["sites"] for line in history]
    return {
        "sites": options.sites,
        "sites_per_pass": summary["sites_per_pass"],
        "s_per_client_round": [
            line["seconds"] / n for line, n in zip(history, trained, strict=True)
        ],
        "start_to_end_of_round_1_s": ends[0] - STARTED,
        "prepared_s": ready - STARTED,
        "total_s": time.time() - STARTED,
        "peak_pss_mb": memory.megabytes,
        "dropped": sum(len(line["dropped"]) for line in history),
    }


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="jsonl with text and label")
    parser.add_argument("--sites", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--fraction", type=float, default=1.0, help="of the sites in a round")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=32)
    parser.add_argument("--layers", type=int, default=6, help="of the backbone")
    parser.add_argument("--top-layers", type=int, default=0, help="LoRA only there; 0 is all")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument(
        "--sites-per-pass", type=lambda s: s if s == "auto" else int(s), default="auto"
    )
    parser.add_argument("--workers", type=int)
    parser.add_argument("--like-the-peer", type=Path, help="file with the peer's initial adapter")
    parser.add_argument("--pad", action="store_true", help="to --seq tokens, as the peer does")
    parser.add_argument("--save", type=Path, help="write the final adapter (torch.save) here")
    parser.add_argument("--verbose", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
