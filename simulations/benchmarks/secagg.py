"""What a round of secure aggregation costs, beside Flower 1.41's own SecAgg+ on the same machine.

    python simulations/benchmarks/secagg.py --peer flower_secagg.py
    python simulations/benchmarks/secagg.py --scaling --plot cost.png

The first ``--dropout`` of the sites drop after SHARES and before their masked input, where it costs
the coordinator most: every mask that they share with a survivor has to be opened.

CPU seconds are those of the whole process, all its threads, at the same number of sites,
parameters and dropouts for both. A site's cost is the sum over stages of the mean over the sites
that took part; the coordinator's is the sum over stages, from the first signature it checks to the
decoded mean. The peer, a script that is given ``CLIENTS PARAMETERS DROPOUT`` and prints
``client_mean_s``, ``server_s`` and ``up_bytes_per_param`` as one line of JSON, has to count
Flower's stages in the same way; it runs between the passes of ours, so that a machine that slows
down slows both, with one thread (so should ours for a comparison). Messages are not serialised,
but for the masked vector, which both turn into bytes. It is not the same work: Flower signs
nothing, and takes its masks from a generator with 32 bits of seed.

Memory is another pass, because tracemalloc slows Python: the messages of a measured pass are read
from a temporary file, one at a time, by a coordinator that has the traced process to itself.
``coordinator_peak_bytes`` is its peak from the first masked input to the end of unmasking: the
sum, temporaries, everything it was sent and still holds, and the one upload that is arriving
(``upload_bytes`` of it). Not seen: OpenSSL's key schedules, under 1 KB a mask, 256 at a time.
``mean_peak_bytes`` is the peak while the opened sum becomes a mean, on its own memory.

``share_of_aes_rate`` tells how near unmasking is to its floor: mask bytes (masks times 4 bytes
times lanes and parameters) per CPU second of the coordinator's whole UNMASK stage (openings,
secrets, keys, masks, checks), over bytes per CPU second of nothing but AES-256-CTR
``update_into``, on chunks of the same size in as many threads, in this process before and after.
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

from benchmarks.secagg_round import Federation, Pass, aes_rate, federate, play, replay
from fedgraft.common.console import Console, print_error
from fedgraft.common.errors import FedgraftError, InputError
from fedgraft.common.secagg.graph import COMPLETE
from fedgraft.common.secagg.masking import CHUNK
from fedgraft.common.secagg.quantize import LANES

GOALS = {
    "client_cpu_ratio": ">= 8",
    "coordinator_cpu_ratio": ">= 15",
    "bytes_per_parameter": "<= 3.03",
    "coordinator_peak_over_4d": "<= 3",
    "share_of_aes_rate": ">= 0.80",
    "exact": "true",
}  # for 32 sites, 5 million parameters, a quarter dropped, one thread
GROWTH_SITES = (8, 16, 32, 64, 128, 256, 512, 1000)  # each at the fewest parameters
GROWTH_PARAMETERS = (50_000, 150_000, 500_000, 1_500_000, 5_000_000)  # each at GROWTH_AT sites
GROWTH_AT = 32
GROWTH_DROPOUT = 0.2


def ask_peer(script: Path, sites: int, length: int, dropout: float) -> dict[str, Any]:
    """What Flower's protocol costs with the same numbers, as its script prints it.

    Raises:
        FedgraftError: the script failed, printed something else, or did not open a sum.
    """
    command = [sys.executable, str(script), str(sites), str(length), str(dropout)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread)
    try:
        told = json.loads(done.stdout.strip().splitlines()[-1])
        if not told["completed"]:
            raise ValueError(told["errs"])
        return {
            "flower_client_cpu_s": sum(told["client_mean_s"].values()),
            "flower_client_stages": told["client_mean_s"],
            "flower_coordinator_cpu_s": sum(told["server_s"].values()),
            "flower_coordinator_stages": told["server_s"],
            "flower_bytes_per_parameter": told["up_bytes_per_param"]["collect_masked_vectors"],
        }
    except (IndexError, KeyError, ValueError) as error:
        raise FedgraftError(
            f"the peer gave no result: {error} {done.stderr[-300:]}",
            hint="run the script of --peer by itself with three arguments",
        ) from None


def average(runs: list[dict[str, float]]) -> dict[str, float]:
    """Mean over passes, by stage."""
    return {stage: statistics.fmean(run[stage] for run in runs) for stage in runs[0]}


def summarise(federation: Federation, runs: list[Pass]) -> dict[str, Any]:
    """Costs of ``runs`` of one federation, averaged."""
    parameters = federation.parameters
    client = average([run.client.means() for run in runs])
    coordinator = average([run.coordinator.seconds for run in runs])
    return {
        "sites": len(federation.sites),
        "parameters": parameters.length,
        "dropped": federation.dropped,
        "colluders": parameters.colluders,
        "degree": parameters.plan.degree,
        "share_threshold": parameters.plan.share_threshold,
        "threads": federation.threads,
        "passes": len(runs),
        "client_cpu_s": sum(client.values()),
        "client_stages": client,
        "coordinator_cpu_s": sum(coordinator.values()),
        "coordinator_stages": coordinator,
        "unmask_wall_s": statistics.fmean(run.unmask_wall for run in runs),
        "masks_removed": runs[0].masks,
        "upload_bytes": runs[0].upload,
        "bytes_per_parameter": runs[0].upload / parameters.length,
        "exact": all(run.exact for run in runs),
    }


def compare(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Our passes with the peer after the first, the raw AES rate around them, and memory."""
    federation = federate(
        options.sites,
        options.parameters,
        options.dropout,
        options.colluders,
        options.threads,
        options.seed,
    )
    words = LANES + options.parameters
    chunk = min(CHUNK, -(-words // 4) * 4)
    peer: dict[str, Any] = dict.fromkeys(
        ("flower_client_cpu_s", "flower_coordinator_cpu_s", "flower_bytes_per_parameter")
    )
    runs, shares, rates = [], [], []
    with tempfile.TemporaryFile() as tape:
        for number in range(options.passes):
            before = aes_rate(chunk, options.threads)
            with console.steps(f"pass {number + 1}", 5) as steps:
                run = play(federation, steps, None if number else tape)
            rate = (before + aes_rate(chunk, options.threads)) / 2
            mask_rate = run.masks * 4 * words / run.coordinator.seconds["unmasking"]
            runs.append(run)
            rates.append(rate)
            shares.append(mask_rate / rate)
            if options.peer and not number:
                console.note("Flower's SecAgg+: several minutes where sites or parameters are many")
                peer = ask_peer(options.peer, options.sites, options.parameters, options.dropout)
        console.note("memory of the coordinator")
        opened, decoded = replay(federation, tape)
    result = summarise(federation, runs) | peer
    for role in ("client", "coordinator"):
        theirs, ours = result[f"flower_{role}_cpu_s"], result[f"{role}_cpu_s"]
        result[f"{role}_cpu_ratio"] = theirs / ours if theirs else None
    return result | {
        "dropout": options.dropout,
        "seed": options.seed,
        "coordinator_peak_bytes": opened,
        "coordinator_peak_over_4d": opened / (4 * options.parameters),
        "mean_peak_bytes": decoded,
        "aes_bytes_per_cpu_s": statistics.fmean(rates),
        "share_of_aes_rate": statistics.fmean(shares),
        "share_of_aes_rate_passes": shares,
        "client_cpu_s_passes": [sum(run.client.means().values()) for run in runs],
        "coordinator_cpu_s_passes": [sum(run.coordinator.seconds.values()) for run in runs],
        "load": os.getloadavg()[0],
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Print one comparison: figures beside Flower's and the goals, then stages."""

    def cell(value: float | None, form: str = "{:.3f}") -> str:
        return "no peer" if value is None else form.format(value)

    rows = [
        [
            f"{role}, CPU s",
            cell(result[f"{role}_cpu_s"]),
            cell(result[f"flower_{role}_cpu_s"]),
            cell(result[f"{role}_cpu_ratio"], "{:.1f}x"),
            f"{GOALS[f'{role}_cpu_ratio']}x",
        ]
        for role in ("client", "coordinator")
    ]
    upload, theirs = result["bytes_per_parameter"], result["flower_bytes_per_parameter"]
    saved = cell(theirs and theirs / upload, "{:.2f}x")
    title, goal = "upload, bytes a parameter", GOALS["bytes_per_parameter"]
    rows.append([title, cell(upload), cell(theirs), saved, goal])
    for title, key in (
        ("coordinator's peak over 4 bytes a parameter", "coordinator_peak_over_4d"),
        ("unmasking, share of the raw AES rate", "share_of_aes_rate"),
    ):
        rows.append([title, cell(result[key], "{:.2f}"), "", "", GOALS[key]])
    rows.append(["the sum is exact", str(result["exact"]).lower(), "", "", GOALS["exact"]])
    title = (
        f"{result['sites']} sites, {result['parameters']:,} parameters, "
        f"{result['dropped']} dropped, {result['threads']} thread(s)"
    )
    console.table(title, ("", "ours", "Flower 1.41", "Flower / ours", "goal"), rows)
    for role in ("client", "coordinator"):
        stages = [
            [name, cell(took, "{:.4f}"), ""] for name, took in result[f"{role}_stages"].items()
        ]
        console.table(f"{role}, by stage", ("stage", "CPU s", ""), stages)


def grow(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Cost over sites at the fewest parameters, then over parameters; one pass each."""
    fewest, *more = GROWTH_PARAMETERS
    points = [(sites, fewest) for sites in GROWTH_SITES] + [(GROWTH_AT, d) for d in more]
    rows = []
    for sites, length in (points[0], *points):  # the first round of a process is not typical
        federation = federate(
            sites, length, GROWTH_DROPOUT, options.colluders, options.threads, options.seed
        )
        with console.steps(f"{sites} sites, {length:,} parameters", 5) as steps:
            rows.append(summarise(federation, [play(federation, steps)]))
    return rows[1:]


def show_growth(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the table of ``grow``."""
    lines = [
        [
            str(row["sites"]),
            f"{row['parameters']:,}",
            str(row["degree"]),
            f"{row['client_cpu_s']:.3f}",
            f"{row['client_stages']['mask']:.3f}",
            f"{row['coordinator_cpu_s']:.3f}",
            f"{row['coordinator_stages']['unmasking']:.3f}",
            str(row["exact"]).lower(),
        ]
        for row in rows
    ]
    columns = ("sites", "params", "degree", "site s", "mask s")  # must fit in 80 columns
    more = ("coord. s", "unmask s", "exact")
    console.table(f"CPU seconds, {GROWTH_DROPOUT:.0%} of the sites dropped", columns + more, lines)


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Plot ``grow``'s rows into ``file``: CPU seconds over sites, and over parameters."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, NullFormatter

    fewest = GROWTH_PARAMETERS[0]
    panels = (
        ("sites", f"{fewest:,} parameters a site", [r for r in rows if r["parameters"] == fewest]),
        ("parameters", f"{GROWTH_AT} sites", [r for r in rows if r["sites"] == GROWTH_AT]),
    )
    figure = Figure(figsize=(10, 4.6), dpi=150, layout="constrained")
    for axes, (key, title, points) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        x = [point[key] for point in points]
        for role, colour, marker in (("coordinator", "#b5432a", "s"), ("client", "#20639b", "o")):
            y = [point[f"{role}_cpu_s"] for point in points]
            label = "coordinator" if role == "coordinator" else "one site"
            axes.loglog(x, y, color=colour, marker=marker, markersize=5, linewidth=1.8, label=label)
            axes.annotate(
                f"{y[-1]:.2g} s",
                (x[-1], y[-1]),
                (0, 8 if role == "coordinator" else -15),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=colour,
            )
        axes.set(title=title, xlabel=key)
        axes.xaxis.set_major_locator(FixedLocator(x))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.margins(x=0.1, y=0.14)
        axes.grid(True, which="major", color="#e2e2e2", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    left = figure.axes[0]
    left.axvline(COMPLETE, color="#888888", linestyle=":", linewidth=1.2, zorder=0)
    note = "beyond: sparse graph"
    left.text(1.06 * COMPLETE, 0.03, note, transform=left.get_xaxis_transform(), color="#666666")
    left.set_ylabel("CPU seconds a round")
    left.legend(frameon=False, loc="upper left")
    dropped = f"{GROWTH_DROPOUT:.0%} of the sites dropped"
    figure.suptitle(f"What a round of secure aggregation costs, {dropped}", fontweight="bold")
    figure.savefig(file, facecolor="white")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sites", type=int, default=32)
    parser.add_argument("--parameters", type=int, default=5_000_000)
    parser.add_argument("--dropout", type=float, default=0.25, help="fraction of the sites")
    parser.add_argument("--colluders", type=float, default=0.1, help="fraction, at least one site")
    parser.add_argument("--threads", type=int, default=1, help="of every party")
    parser.add_argument("--seed", type=int, default=0, help="of updates, weights and rounding")
    parser.add_argument("--passes", type=int, default=2, help="the peer runs after the first")
    parser.add_argument("--peer", type=Path, help="script that measures Flower's SecAgg+")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--scaling", action="store_true", help="cost over sites and parameters")
    parser.add_argument("--plot", type=Path, help="with --scaling or --read: draw it into this PNG")
    parser.add_argument("--read", type=Path, help="what --scaling --json printed, not a new run")
    return parser.parse_args()


def measure(options: argparse.Namespace, console: Console) -> bool:
    """Do what the options say; whether every sum was exact.

    Raises:
        InputError: an option that cannot work.
    """
    if options.passes < 1:
        raise InputError("--passes must be positive", hint="give 1 or more")
    if options.peer and not options.peer.is_file():
        raise InputError(f"--peer {options.peer} is not a file", hint="give the path of a script")
    if options.plot and not (options.scaling or options.read):
        raise InputError("--plot has nothing to draw", hint="add --scaling, or --read FILE")
    if not (options.scaling or options.read):
        result = compare(options, console)
        show(result, console)
        console.json(result)
        return bool(result["exact"])
    if options.read:
        rows = json.loads(options.read.read_text(encoding="utf-8"))["scaling"]
    else:
        rows = grow(options, console)
    show_growth(rows, console)
    console.json({"dropout": GROWTH_DROPOUT, "scaling": rows, "load": os.getloadavg()[0]})
    if options.plot:
        draw(rows, options.plot)
    return all(row["exact"] for row in rows)


def main() -> int:
    """Measure and print; 0, or 1 for a wrong sum or a failed peer, or 2 for a bad option."""
    options = read_options()
    try:
        if not measure(options, Console(as_json=options.json)):
            hint = "do not trust these figures: the protocol is broken"
            raise FedgraftError("an opened sum is not the exact sum", hint=hint)
    except FedgraftError as error:
        print_error(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
