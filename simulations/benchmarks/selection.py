"""Does `fedgraft select` put backbones in the order that fine-tuning would have put them?

    FEDGRAFT_DATA=../shared python simulations/benchmarks/selection.py --data trec --json trec.json

Candidates are a pre-trained model cut at several depths (``truncate.py``) and the same architecture
with random weights. Each is scored, and then really fine-tuned: the example's own federation with
LoRA, made small (``DATA``), once for each of ``--rates``. What counts is the rate that does best
on the sites' validation examples, for each candidate its own: at one rate for all, a candidate
that only this rate does not suit would be put too low. Kendall's tau between the two orders is
the measure.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
BUILTIN = ROOT.parent / "common" / "fedgraft" / "common" / "builtin" / "glyph-vit"
TRUNCATE = Path(__file__).with_name("truncate.py")
SCORES = ("logme", "h_score", "leep", "nce")


@dataclass(frozen=True)
class Case:
    """A data set made small: ``rows`` for training over ``sites`` and ``tested`` rows, if files."""

    job: Path
    train: str = ""
    test: str = ""
    rows: int = 0
    tested: int = 0
    sets: tuple[str, ...] = ()
    text: bool = True


QUICK = ("rounds.min_sites=1", "simulation.baselines=[]", "simulation.finetune_epochs=0")
TEXT = (
    "simulation.sites=5",
    "rounds.count=6",
    'simulation.partition={kind="iid", min_examples=50}',  # a backbone's worth, not a skew's
    'method.targets="all-linear"',
    "training.epochs=2",
)
SENTIMENT = ('job.labels=["negative","positive"]', "data.label=label", "data.max_length=64")
DATA = {
    "trec": Case(EXAMPLES / "trec.toml", "trec/train.jsonl", "trec/test.jsonl", 1000, 500, TEXT),
    "banking77": Case(
        EXAMPLES / "banking77.toml",
        "banking77/train.csv",
        "banking77/test.csv",
        1000,
        1000,
        TEXT,
    ),
    "sst2": Case(
        EXAMPLES / "trec.toml",
        "sst2/train.jsonl",
        "sst2/test.jsonl",
        1500,
        1000,
        (*TEXT, *SENTIMENT),
    ),
    "digits": Case(ROOT / "fedgraft/simulations/demo/digits.toml", text=False),
    "pneumonia": Case(
        EXAMPLES / "pneumonia.toml",
        sets=('method.targets="all-linear"', "rounds.count=6"),
        text=False,
    ),
}


def main() -> None:
    """Score, fine-tune, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", choices=DATA, nargs="+", default=["digits"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--layers", type=int, nargs="+", help="depths (default: 1 to all)")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 5e-3, 1e-2])
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    results = []
    for name in options.data:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["FEDGRAFT_CACHE"] = f"{folder}/cache"
            results.append(measure(name, options, Path(folder)))
        print(table(results[-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


def measure(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Scores and accuracies of every candidate on the data set ``name``, means over ``seeds``."""
    case, seeds = DATA[name], options.seeds
    sources = candidates(case, options.layers, folder)
    sets = [*QUICK, *case.sets, *small_files(case, folder)]
    rows: dict[str, dict[str, list[float]]] = {key: {} for key in sources}
    seconds = {"select": 0.0, "fine-tune": 0.0}
    for seed in seeds:
        seeded = [*sets, f"job.seed={seed}"]
        found = run("select", case.job, seeded, ["--backbones", ",".join(sources.values())])
        names = {source: key for key, source in sources.items()}
        for one in found["backbones"]:
            row = rows[names[one["backbone"]]]
            for score in SCORES:
                if one[score] is not None:
                    row.setdefault(score, []).append(one[score])
            seconds["select"] += one["seconds"]
        for key, source in sources.items():
            plain, random = source.removeprefix("random:"), source.startswith("random:")
            weights = "random" if random else "pretrained"
            chosen = [*seeded, f"backbone.source={plain}", f"backbone.weights={weights}"]
            tried = []
            for rate in options.rates:
                settings = [*chosen, f"training.learning_rate={rate}"]
                summary = run("simulate", case.job, settings, ["--runs", f"{folder}/runs"])
                seconds["fine-tune"] += summary["seconds"]
                accuracy = summary["final"]["federated"]["accuracy"]
                held_out = validated(Path(summary["folder"]))
                tried.append((held_out, -rate, accuracy))
                told = f"rate {rate:g}: validation {held_out:.3f}, test {accuracy:.3f}"
                print(name, seed, key, told, file=sys.stderr, flush=True)
            _, rate, accuracy = max(tried)
            rows[key].setdefault("accuracy", []).append(accuracy)
            rows[key].setdefault("rate", []).append(-rate)
    means = {key: {k: statistics.mean(v) for k, v in row.items()} for key, row in rows.items()}
    return {
        "data": name,
        "seeds": seeds,
        "sites": found["sites"],
        "train_examples": found["backbones"][0]["examples"],
        "candidates": means,
        "by_seed": rows,
        "tau": {score: tau(means, score) for score in SCORES},
        "seconds": {key: round(value, 1) for key, value in seconds.items()},
    }


def candidates(case: Case, layers: list[int] | None, folder: Path) -> dict[str, str]:
    """Sources by a short name: the model at each depth, and its architecture at random."""
    whole = data_folder() / "models" / "all-MiniLM-L6-v2" if case.text else BUILTIN
    name = "MiniLM" if case.text else "glyph-vit"
    depths = layers or ([1, 2, 3, 4, 6] if case.text else [1, 2, 3])
    found = {}
    for depth in depths:
        out = folder / f"{name}-{depth}"
        options = [str(whole), "--layers", str(depth), "--out", str(out)]
        subprocess.run(
            [sys.executable, str(TRUNCATE), *options], stdout=subprocess.DEVNULL, check=True
        )
        found[f"{name}, {depth} layer{'s' * (depth > 1)}"] = f"path:{out}"
    last = max(depths)
    found[f"{name}, {last} layers, random"] = f"random:path:{folder}/{name}-{last}"
    if not case.text:
        found[f"{name}, 1 layer, random"] = f"random:path:{folder}/{name}-1"
    return found


def small_files(case: Case, folder: Path) -> list[str]:
    """Overrides that name files with some of the rows, drawn once and in a fixed order."""
    sets = []
    for key, path, count in (("train", case.train, case.rows), ("test", case.test, case.tested)):
        if path:
            made = folder / f"{key}{Path(path).suffix}"
            sample(data_folder() / "data" / path, count, made)
            sets.append(f"simulation.{key}={made}")
    return sets


def sample(source: Path, count: int, out: Path) -> None:
    """``count`` rows of a CSV or JSONL file, at most, in a random order."""
    draw = np.random.default_rng(0)
    if source.suffix == ".csv":
        with source.open(encoding="utf-8", newline="") as file:
            head, *rows = list(csv.reader(file))
        chosen = draw.permutation(len(rows))[:count]
        with out.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([head, *(rows[at] for at in chosen)])
        return
    lines = source.read_text(encoding="utf-8").splitlines()
    chosen = draw.permutation(len(lines))[:count]
    out.write_text("\n".join(lines[at] for at in chosen) + "\n", encoding="utf-8")


def run(verb: str, job: Path, sets: list[str], more: list[str]) -> dict[str, Any]:
    """What `fedgraft VERB` says as JSON."""
    words = [word for item in sets for word in ("--set", item)]
    command = [sys.executable, "-m", "fedgraft", verb, str(job), *words, *more, "--json", "-q"]
    return dict(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))


def validated(run_folder: Path) -> float:
    """The accuracy on the sites' validation examples after the last round."""
    last = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return float(json.loads(last)["validation"]["accuracy"])


def tau(means: dict[str, dict[str, float]], score: str) -> float | None:
    """Kendall's tau-b between ``score`` and accuracy over the candidates that have the score."""
    pairs = [(row[score], row["accuracy"]) for row in means.values() if score in row]
    return float(kendalltau(*zip(*pairs, strict=True)).statistic) if len(pairs) > 2 else None


def data_folder() -> Path:
    """Where the real data and backbones lie."""
    return Path(os.environ.get("FEDGRAFT_DATA", "../shared")).resolve()


def table(result: dict[str, Any]) -> str:
    """A Markdown table, the best fine-tuned first."""
    lines = [
        f"{result['data']}: {result['sites']} sites, {result['train_examples']} training examples, "
        f"{len(result['seeds'])} seed(s); select {result['seconds']['select']:.0f} s, "
        f"fine-tuning {result['seconds']['fine-tune']:.0f} s",
        "",
        "| backbone | fine-tuned, % | LogME | H-score | LEEP | NCE |",
        "|---|---|---|---|---|---|",
    ]
    order = sorted(result["candidates"].items(), key=lambda item: -item[1]["accuracy"])
    for key, row in order:
        cells = " | ".join(f"{row[s]:.4f}" if s in row else "-" for s in SCORES)
        lines.append(f"| {key} | {100 * row['accuracy']:.1f} | {cells} |")
    taus = (result["tau"][score] for score in SCORES)
    cells = " | ".join("-" if one is None else f"{one:.2f}" for one in taus)
    return "\n".join([*lines, f"| Kendall tau with fine-tuning | | {cells} |", ""])


if __name__ == "__main__":
    main()
