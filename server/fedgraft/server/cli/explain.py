"""``fedgraft explain``: show the parts of one input that moved a run's model to its answer."""

from pathlib import Path
from typing import Annotated

import typer

from fedgraft.common.console import Console
from fedgraft.common.errors import InputError

__all__ = ["explain"]


def explain(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    given: Annotated[str, typer.Argument(metavar="INPUT", help="A text, or an image file.")],
    label: Annotated[
        str | None, typer.Option(help="Explain this label; the likeliest if absent.")
    ] = None,
    out: Annotated[Path, typer.Option(help="PNG to write for an image.")] = Path("explanation.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show which tokens or pixels moved a run's model to its answer (integrated gradients).

    The input is read here and stays here.
    """
    from fedgraft.common.config.compatibility import refusal_of
    from fedgraft.server.export.attribution import EXPLAINERS, write_heat
    from fedgraft.server.runs.reopen import reopen

    opened = reopen(run)
    job = opened.run.job
    if refused := refusal_of(job, "explanation"):
        raise InputError(refused[0], hint=refused[1])
    labels, explainer = job.job.labels, EXPLAINERS.get(job.task.modality.name)
    if explainer is None:
        raise InputError(
            f"no answer of {job.job.task} can be explained",
            hint=f"a job that reads one of: {', '.join(EXPLAINERS)}",
        )
    if label is not None and label not in labels:
        raise InputError(f"no label {label}", hint=f"there is: {', '.join(labels[:10])}")
    wanted = None if label is None else labels.index(label)
    with opened.adapted() as bench:
        found = explainer(bench, given, job.settings, wanted)
    console, probability = Console(as_json=as_json), float(found.probabilities[found.label])
    told = {"label": labels[found.label], "probability": probability, "missing": found.missing}
    headline = f"{labels[found.label]}: {100 * probability:.1f} %"
    if not found.parts:
        write_heat(found, Path(given), out)
        console.json({**told, "picture": str(out)})
        console.text(f"{headline}\nwrote {out}")
        return
    weights = [float(one) for one in found.weights]
    console.json({**told, "tokens": list(found.parts), "weights": weights})
    console.text(headline)
    most = max(map(abs, weights)) or 1.0
    rows = [
        [token, f"{weight:+.3f}", ("+" if weight > 0 else "-") * round(20 * abs(weight) / most)]
        for token, weight in zip(found.parts, weights, strict=True)
    ]
    console.table("For (+) and against (-), in log-odds", ["token", "weight", ""], rows)
