"""Sites per second and memory of a simulation beside Flower 1.41's own Ray engine.

    python simulations/benchmarks/engine.py --backbone DIR --data FILE --peer flower_ray_lora.py
    python simulations/benchmarks/engine.py --backbone DIR --data FILE --scale

The peer is a script that trains the same LoRA on the same rows with Flower's engine and prints
``s_per_client_round``, ``start_to_end_of_round_1_s`` and ``peak_pss_mb`` as a line of JSON. It and
ours (``engine_run.py``, the product's own way through) run alternately, ``--repeats`` times each; a
figure is the median over them. Seconds of a client-round are a round's seconds over its sites; of
``--rounds`` rounds the median. Peak memory is the proportional set size of a whole process tree.

Same numerics: both start from the same adapter, take the same batches in the same order and steps
of the same AdamW. The peer pads every text to ``--seq`` tokens. ``fp32_ratio`` is measured with the
same padding in ours, so that both compute the same; ``*_padded_as_needed`` is what the product does
by itself, which is to pad to the longest of a batch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fedgraft.common.console import Console, print_error
from fedgraft.common.errors import FedgraftError, InputError

GOALS = {
    "fp32_ratio": ">= 1.3",
    "fp32_memory_ratio": "<= 0.4",
    "first_round_ratio": ">= 2",
    "top2_ratio": ">= 2.5",
    "bf16_ratio": ">= 2.3",
    "max_difference": "<= 1e-5",
    "memory_10000_over_100": "<= 1.1",
    "memory_1000_at_once_mb": "<= 1500",
    "seconds_1000_over_250_a_site": "0.9 to 1.1",
}
OURS = Path(__file__).parent / "engine_run.py"
Figures = dict[str, Any]


def run(command: list[str]) -> Figures:
    """The last line of what ``command`` prints, as JSON.

    Raises:
        FedgraftError: it failed or printed something else.
    """
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    try:
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    except (IndexError, ValueError):
        raise FedgraftError(
            f"{' '.join(command[:1])} gave no result: {done.stderr[-300:]}",
            hint="run it by itself with the same options",
        ) from None


class Pair:
    """The peer and ours with the same options, in turn."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options, self.console = options, console

    def peer(self, *more: str) -> list[str]:
        """The peer's command."""
        o = self.options
        return [str(o.peer), "--backbone", str(o.backbone), "--data", str(o.data), *more]

    def ours(self, *more: str) -> list[str]:
        """Our command."""
        o = self.options
        return [str(OURS), "--backbone", str(o.backbone), "--data", str(o.data), *more]

    def in_turn(self, name: str, peer: list[str], *ours: list[str]) -> list[list[Figures]]:
        """The figures of the peer and of each of ours, run one after the other, several times."""
        found: list[list[Figures]] = [[] for _ in range(1 + len(ours))]
        repeats = self.options.repeats
        with self.console.steps(name, repeats * len(found)) as steps:
            for _ in range(repeats):
                for at, command in enumerate((peer, *ours)):
                    found[at].append(run(command))
                    steps.done(f"{seconds(found[at][-1:]):.3f} s a client-round")
        return found


def seconds(runs: list[Figures]) -> float:
    """Seconds of a client-round: median over rounds, then over runs."""
    return float(statistics.median(statistics.median(one["s_per_client_round"]) for one in runs))


def median(runs: list[Figures], key: str) -> float:
    """Median over runs."""
    return statistics.median(float(one[key]) for one in runs)


def initial_adapter(options: argparse.Namespace, path: Path, top_layers: int) -> None:
    """The peer's initial adapter, by its own seeds and peft's own initialisation."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoConfig, AutoModelForSequenceClassification

    rows = options.data.read_text(encoding="utf-8").splitlines()
    labels = len({json.loads(row)["label"] for row in rows})
    layers = AutoConfig.from_pretrained(options.backbone).num_hidden_layers
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(options.backbone, num_labels=labels)
    torch.manual_seed(0)
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=8,
        lora_alpha=16,
        target_modules=["query", "value"],
        layers_to_transform=list(range(layers - top_layers, layers)) if top_layers else None,
    )
    state = get_peft_model_state_dict(get_peft_model(model, config))
    torch.save({name: value.float() for name, value in state.items()}, path)


def largest_difference(one: Path, other: Path) -> float:
    """Between two adapters of the same names, as ``torch.save`` wrote them."""
    import torch

    first, second = (torch.load(path, weights_only=True) for path in (one, other))
    if first.keys() != second.keys():
        raise FedgraftError("the two adapters have other tensors", hint="other versions of peft?")
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def compare(options: argparse.Namespace, console: Console) -> Figures:
    """Everything beside the peer."""
    pair = Pair(options, console)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start, top = folder / "start.pt", folder / "top.pt"
        initial_adapter(options, start, 0)
        initial_adapter(options, top, 2)
        theirs, mine = folder / "theirs.pt", folder / "mine.pt"
        like = ["--like-the-peer", str(start)]
        fp32 = pair.in_turn(
            "fp32",
            pair.peer("--save", str(theirs)),
            pair.ours(*like, "--pad", "--save", str(mine)),
            pair.ours(*like),
        )
        difference = largest_difference(theirs, mine)
        rounds = ("--rounds", "5", "--top-layers", "2")
        top2 = pair.in_turn(
            "top 2 layers",
            pair.peer(*rounds),
            pair.ours(*rounds, "--like-the-peer", str(top), "--pad"),
            pair.ours(*rounds, "--like-the-peer", str(top)),
        )
        bf16 = pair.in_turn(
            "bf16",
            pair.peer("--bf16"),
            pair.ours("--bf16", *like, "--pad"),
            pair.ours("--bf16", *like),
        )
    peer, padded, free = fp32
    return {
        "fp32_ratio": seconds(peer) / seconds(padded),
        "fp32_ratio_padded_as_needed": seconds(peer) / seconds(free),
        "fp32_memory_ratio": median(padded, "peak_pss_mb") / median(peer, "peak_pss_mb"),
        "first_round_ratio": median(peer, "start_to_end_of_round_1_s")
        / median(padded, "start_to_end_of_round_1_s"),
        "top2_ratio": seconds(top2[0]) / seconds(top2[1]),
        "top2_ratio_padded_as_needed": seconds(top2[0]) / seconds(top2[2]),
        "bf16_ratio": seconds(bf16[0]) / seconds(bf16[1]),
        "bf16_ratio_padded_as_needed": seconds(bf16[0]) / seconds(bf16[2]),
        "max_difference": difference,
        "runs": {
            name: {"peer": runs[0], "padded": runs[1], "as_needed": runs[2]}
            for name, runs in (("fp32", fp32), ("top2", top2), ("bf16", bf16))
        },
    }


def scale(options: argparse.Namespace, console: Console) -> Figures:
    """Ten thousand sites beside a hundred, as many in a round; and a thousand at once."""
    pair = Pair(options, console)
    cells = {
        "100": ("--sites", "100", "--rounds", "3"),
        "10000": ("--sites", "10000", "--fraction", "0.01", "--rounds", "3"),
        "250_at_once": ("--sites", "250", "--rounds", "1"),
        "1000_at_once": ("--sites", "1000", "--rounds", "1"),
    }
    found: dict[str, Figures] = {}
    with console.steps("scale", len(cells)) as steps:
        for name, cell in cells.items():
            found[name] = run(pair.ours(*cell))
            steps.done(f"{name}: {found[name]['peak_pss_mb']:.0f} MB")
    each = {name: statistics.median(one["s_per_client_round"]) for name, one in found.items()}
    return {
        "memory_10000_over_100": found["10000"]["peak_pss_mb"] / found["100"]["peak_pss_mb"],
        "memory_1000_at_once_mb": found["1000_at_once"]["peak_pss_mb"],
        "seconds_1000_over_250_a_site": each["1000_at_once"] / each["250_at_once"],
        "scale": found,
    }


def show(result: Figures, console: Console) -> None:
    """One table of every figure that is a number."""
    rows = [
        [name, f"{value:.3g}", GOALS.get(name, "")]
        for name, value in result.items()
        if isinstance(value, float)
    ]
    console.table("Simulation beside Flower's Ray engine", ["figure", "measured", "goal"], rows)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbone", type=Path, required=True, help="a BERT-like model's folder")
    parser.add_argument("--data", type=Path, required=True, help="jsonl with text and label")
    parser.add_argument("--peer", type=Path, help="script that simulates on Flower's Ray engine")
    parser.add_argument("--scale", action="store_true", help="ten thousand sites, ours alone")
    parser.add_argument("--repeats", type=int, default=3, help="of each, beside the peer")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser.parse_args()


def measure(options: argparse.Namespace, console: Console) -> Figures:
    """What the options ask for.

    Raises:
        InputError: an option that cannot work.
    """
    for path in (options.backbone, options.data, *([options.peer] if options.peer else [])):
        if not path.exists():
            raise InputError(f"no {path}", hint="give the path of what is there")
    if not (options.peer or options.scale) or options.repeats < 1:
        raise InputError("nothing to measure", hint="--peer SCRIPT, --scale, --repeats 1 or more")
    result: Figures = {}
    if options.peer:
        result.update(compare(options, console))
    if options.scale:
        result.update(scale(options, console))
    return {**result, "load": os.getloadavg()[0]}


def main() -> int:
    """Measure and print; 0, 1 where a run failed, 2 for a bad option."""
    options = read_options()
    console = Console(as_json=options.json)
    try:
        result = measure(options, console)
    except FedgraftError as error:
        print_error(error)
        return error.exit_code
    show(result, console)
    console.json(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
