"""A map of the sites: the directions in which training alone changes the model, from one start.

Every site of a simulation trains alone for ``local_only``, and all sites start from the same
adapter. A site's direction is the change of the exchanged parameters in this training. Sites with
similar directions can help each other. Between sites with different directions, federating may hurt
(Sattler et al. 2020, "Clustered Federated Learning", arXiv:1910.01991, groups sites by these
cosines).

Only a simulation has such a map, because the map needs each site's own update. In a federation with
secure aggregation nobody sees this update. In a federation in clear, a site should not be asked for
it only to draw a figure.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.config.job import Job
from fedgraft.common.layout import Vector

__all__ = ["MOST", "classical_scaling", "cosines", "keep_direction", "map_sites", "why_absent"]

MOST = 60  # sites; more names on a map cannot be read
FILE = "direction.npy"
DIGITS = 6  # decimals; later decimals may depend on the order of sums

Matrix = NDArray[np.float64]


def why_absent(job: Job, sites: int) -> str:
    """Return the reason why there is no map of these sites; empty if there can be one."""
    if job.privacy.secure_aggregation.enabled:
        return (
            "this federation uses secure aggregation, under which nobody sees a single site's "
            "update, so its directions are not computed here either"
        )
    if sites < 3:
        return f"{'two sites' if sites == 2 else 'one site'} make no map"
    if sites > MOST:
        return f"a map of {sites:,} sites cannot be read; up to {MOST} are shown"
    if job.simulation is None or "local_only" not in job.simulation.baselines:
        return "it needs the baseline local_only, which was not run"
    return ""


def keep_direction(state: Path, direction: Vector) -> None:
    """Save the change by training alone, float32 [exchanged size], in the site's folder."""
    state.mkdir(parents=True, exist_ok=True)
    np.save(state / FILE, direction, allow_pickle=False)


def map_sites(job: Job, states: Sequence[Path], names: Sequence[str]) -> dict[str, Any]:
    """Return ``sites``, their ``cosine`` matrix, ``places`` [n, 2] and the share ``explained``.

    ``explained`` is the share of the squared distances that the places show. Sites that could not
    be trained alone are not on the map. If there is no map, ``absent`` is the reason.
    """
    absent = why_absent(job, len(names))
    kept = [(name, state / FILE) for name, state in zip(names, states, strict=True)]
    kept = [(name, path) for name, path in kept if path.exists()]
    if absent or len(kept) < 3:
        return {"absent": absent or "fewer than three sites could be trained alone"}
    between = cosines([np.load(path, allow_pickle=False) for _, path in kept])
    places, explained = classical_scaling(np.sqrt(np.maximum(2 - 2 * between, 0)))
    return {
        "sites": [name for name, _ in kept],
        "cosine": between.round(DIGITS).tolist(),
        "places": places.round(DIGITS).tolist(),
        "explained": round(explained, DIGITS),
    }


def cosines(directions: Sequence[Vector]) -> Matrix:
    """Return the cosines between all pairs of ``directions``, [n, n]; 0 for a zero direction."""
    rows = np.stack(directions).astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    units = rows / np.where(norms > 0, norms, 1.0)
    between: Matrix = np.clip(units @ units.T, -1.0, 1.0)
    return between


def classical_scaling(distances: Matrix) -> tuple[Matrix, float]:
    """Return places in the plane whose distances approximate ``distances`` [n, n] best.

    Torgerson 1952, "Multidimensional Scaling: I. Theory and Method", Psychometrika 17. Each axis
    points towards the site farthest from its origin, so that equal maps look the same.

    Returns:
        Places [n, 2], and the share of all squared distances from the centre that they show.
    """
    squares = distances**2
    centred = squares - squares.mean(0) - squares.mean(1)[:, np.newaxis] + squares.mean()
    values, vectors = np.linalg.eigh(-centred / 2)
    values = np.maximum(values[::-1], 0.0)
    places = vectors[:, ::-1][:, :2] * np.sqrt(values[:2])
    farthest = places[np.abs(places).argmax(0), [0, 1]]
    places = places * np.where(farthest < 0, -1.0, 1.0)
    total = values.sum()
    return places, float(values[:2].sum() / total) if total > 0 else 0.0
