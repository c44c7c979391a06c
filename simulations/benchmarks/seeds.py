"""The same job over several seeds: one table with means and intervals.

    python simulations/benchmarks/seeds.py simulations/examples/trec.toml --seeds 0 1 2

A seed changes everything random: the split over sites, the head, the factors, the batches. With
``--read`` the table is made of summaries that `fedgraft simulate --json` printed before.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from fedgraft.simulations.baselines.over_seeds import spread

MODELS = ("federated", "central", "head_only", "zero_shot", "local_only")


def run(job: Path, seed: int, overrides: list[str], runs: Path) -> dict[str, Any]:
    """Simulate ``job`` with ``seed``; its summary."""
    sets = [word for item in (*overrides, f"job.seed={seed}") for word in ("--set", item)]
    command = [sys.executable, "-m", "fedgraft", "simulate", str(job), "--runs", str(runs), *sets]
    done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def table(summaries: list[dict[str, Any]]) -> str:
    """A Markdown table: a row a model, a column a seed, then mean and interval."""
    seeds = [str(number) for number in range(len(summaries))]
    lines = [
        f"| pooled test accuracy, % | {' | '.join(f'run {s}' for s in seeds)} | mean ± 95 % |",
        "|---|" + "---|" * (len(seeds) + 1),
    ]
    for model in MODELS:
        found = [summary["final"][model] for summary in summaries]
        values = [metrics["accuracy"] for metrics in found if metrics]
        if not values:
            continue
        cells = " | ".join("not run" if m is None else f"{100 * m['accuracy']:.1f}" for m in found)
        lines.append(f"| {model.replace('_', ' ')} | {cells} | {spread(values).text(scale=100)} |")
    gaps = [
        s["final"]["central"]["accuracy"] - s["final"]["federated"]["accuracy"]
        for s in summaries
        if s["final"]["central"]
    ]
    if len(gaps) == len(summaries):
        cells = " | ".join(f"{100 * gap:.1f}" for gap in gaps)
        mean = spread(gaps).text(scale=100)
        lines.append(f"| central minus federated, points | {cells} | {mean} |")
    rows = (
        ("seconds", "seconds", "{:.0f}"),
        ("peak memory, MB", "peak_memory_mb", "{:.0f}"),
        ("bytes up, a site and round", "bytes_up_per_site_round", "{:,}"),
        ("bytes down, a site and round", "bytes_down_per_site_round", "{:,}"),
    )
    for title, key, form in rows:
        cells = " | ".join(form.format(summary[key]) for summary in summaries)
        lines.append(f"| {title} | {cells} | |")
    return "\n".join(lines)


def main() -> None:
    """Run or read, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("job", type=Path, nargs="?", help="job file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, help="write the summaries here as JSON")
    parser.add_argument("--read", type=Path, nargs="+", help="summaries instead of a job")
    options = parser.parse_args()
    if options.read:
        summaries = [json.loads(path.read_text(encoding="utf-8")) for path in options.read]
    elif options.job:
        summaries = [run(options.job, seed, options.set, options.runs) for seed in options.seeds]
    else:
        parser.error("name a job file, or --read summaries")
    if options.out:
        options.out.write_text(json.dumps(summaries, indent=1), encoding="utf-8")
    print(table(summaries))


if __name__ == "__main__":
    main()
