"""The report's figures, made from a run's records; None if nothing was measured."""

from collections.abc import Mapping, Sequence

from fedgraft.common.metrics.metric import Metric
from fedgraft.server.report import plots
from fedgraft.server.report.plots import MODELS, Curve, Estimate, Picture
from fedgraft.server.report.site_overview import MANY_SITES
from fedgraft.server.report.values import (
    Record,
    as_decimal,
    as_share,
    read_column,
    read_estimate,
    read_record,
    read_records,
    round_numbers,
)

__all__ = ["POOLED", "curve_pictures", "pooled_picture", "site_picture"]

DOT_PLOT_SITES = 40  # above, one row per site is too long to read
POOLED = ("federated", "central", "head_only", "zero_shot", "local_only")
MARKED_ROUNDS = 100  # above, crosses per round overlap to a bar
SINGLE_DOTS = 400  # above, dots hide each other
PLOTTED = ("federated", "federated_tuned", "local_only")


def pooled_picture(final: Record, share: Metric) -> Picture | None:
    """Return the figure of every model's ``share`` on the pooled test set."""
    rows = [(model, read_estimate(read_record(final, model), share.key)) for model in POOLED]
    rows = [(model, found) for model, found in rows if found.value is not None]
    if not rows:
        return None
    said = "; ".join(f"{MODELS[model].name} {as_share(found.value)}" for model, found in rows)
    return Picture(
        plots.single_dots(rows, label=f"Pooled test {share.name}", key="pooled"),
        f"Dot plot of {share.name} on the pooled test set with 95 % intervals: {said}.",
        f"{share.title} on the pooled test set. Bars are 95 % intervals.",
    )


def curve_pictures(rounds: Sequence[Record], share: Metric) -> list[Picture]:
    """Return the figures of validation and of losses over rounds, without those not measured."""
    checks = [read_record(entry, "validation") for entry in rounds]
    of_share = Curve(share.name, read_column(checks, share.key))
    macro_f1 = Curve("macro F1", read_column(checks, "macro_f1"), second=True)
    validation = Curve("validation loss", read_column(checks, "loss"))
    train = Curve("train loss", read_column(rounds, "train_loss"), second=True)
    pictures = (
        _curve_picture(rounds, [of_share, macro_f1], "Federated validation", percent=True),
        _curve_picture(rounds, [validation, train], "Loss", percent=False),
    )
    return [picture for picture in pictures if picture is not None]


def _curve_picture(
    rounds: Sequence[Record], lines: Sequence[Curve], label: str, *, percent: bool
) -> Picture | None:
    lines = [line for line in lines if any(value is not None for value in line.values)]
    if not lines:
        return None
    numbers = round_numbers(rounds)
    lossy = {at for at, one in zip(numbers, rounds, strict=True) if read_records(one, "dropped")}
    dropped = sorted(lossy) if len(lossy) <= MARKED_ROUNDS else []
    key = label.split()[-1].lower()
    svg = plots.curves(numbers, lines, dropped=dropped, label=label, percent=percent, key=key)
    said = "; ".join(_course(line, percent) for line in lines)
    mark = " A cross marks a round in which sites were dropped." if dropped else ""
    if len(lossy) > MARKED_ROUNDS:
        mark = f" Sites were dropped in {len(lossy):,} of {len(rounds):,} rounds."
    return Picture(svg, f"{label} over {len(rounds)} rounds: {said}.", f"{label} per round.{mark}")


def _course(line: Curve, percent: bool) -> str:
    known = [value for value in line.values if value is not None]
    write = as_share if percent else as_decimal
    return f"{line.name} from {write(known[0])} at first to {write(known[-1])} at last"


def site_picture(sites: Sequence[Record], share: Metric) -> Picture | None:
    """Return a dot plot of all sites with intervals, or for many sites one dot per site."""
    estimates = [
        {model: read_estimate(read_record(site, model), share.key) for model in PLOTTED}
        for site in sites
    ]
    if len(sites) > DOT_PLOT_SITES:
        return _site_scatter(estimates, share)
    models = [model for model in PLOTTED if any(row[model].value is not None for row in estimates)]
    if not models:
        return None
    rows = [(str(site.get("name")), row) for site, row in zip(sites, estimates, strict=True)]
    names = ", ".join(MODELS[model].name.lower() for model in models)
    return Picture(
        plots.dots(rows, models, label=f"{share.title} on the site's own test set", key="sites"),
        f"Dot plot of own-test {share.name} with 95 % intervals for {len(sites)} sites ({names}); "
        "the numbers are in the table of sites.",
        f"{share.title} on each site's own test set. Bars are 95 % intervals.",
    )


def _site_scatter(estimates: Sequence[Mapping[str, Estimate]], share: Metric) -> Picture | None:
    found = [(row["local_only"].value, row["federated"].value) for row in estimates]
    pairs = [(local, ours) for local, ours in found if local is not None and ours is not None]
    if not pairs:
        return None
    above = sum(ours > local for local, ours in pairs)
    below = sum(ours < local for local, ours in pairs)
    alt = (
        f"of own-test {share.name}, federated against local only, for {len(pairs):,} sites: "
        f"{above:,} above the line of equality, {below:,} below."
    )
    both = f"{len(pairs):,} of {len(estimates):,} have both values"
    sides = "above the dashed line federated is better, below it local only."
    if len(pairs) > SINGLE_DOTS:
        return Picture(
            plots.density(pairs, key="sites"),
            f"Density plot {alt}",
            f"Sites by {share.name} of both models ({both}): the stronger a square's colour, the "
            f"more sites it holds. {sides[0].upper()}{sides[1:]} {above:,} sites are above it, "
            f"{below:,} below.",
        )
    where = "the table" if len(estimates) <= MANY_SITES else "summary.json"
    return Picture(
        plots.scatter(pairs, key="sites"),
        f"Scatter plot {alt}",
        f"One dot per site ({both}): {sides} Over {DOT_PLOT_SITES} sites no interval is drawn; "
        f"{where} has them.",
    )
