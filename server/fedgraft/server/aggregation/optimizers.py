"""Server optimisers: the merged update taken as a negative gradient.

Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 2, without bias correction as there:

    m <- b1 m + (1 - b1) D
    adam:  v <- b2 v + (1 - b2) D^2
    yogi:  v <- v - (1 - b2) D^2 sign(v - D^2)
    x <- x + lr m / (sqrt(v) + tau)

``momentum`` is FedAvgM (Hsu et al. 2019): m <- b1 m + D, x <- x + lr m. ``none``: x <- x + lr D.
"""

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.adapters import Vector
from fedgraft.common.job import ServerOptimizer
from fedgraft.server.state import Moments

__all__ = ["apply"]


def apply(
    settings: ServerOptimizer, adapter: Vector, step: NDArray[np.float64], moments: Moments
) -> tuple[Vector, Moments]:
    """Move ``adapter`` (float32 [d]) by ``step`` (float64 [d]): the new adapter and moments.

    ``moments`` is what the last call returned, empty at first; nothing is changed in place.
    """
    kind, lr = settings.kind, settings.learning_rate
    if kind == "none":
        return _moved(adapter, lr * step), {}
    m = moments.get("m", np.zeros_like(step))
    if kind == "momentum":
        m = settings.beta1 * m + step
        return _moved(adapter, lr * m), {"m": m}
    m = settings.beta1 * m + (1 - settings.beta1) * step
    squared = step**2
    # tau^2 as in the paper: no coordinate starts with an unbounded step
    v = moments.get("v", np.full_like(step, settings.tau**2))
    if kind == "adam":
        v = settings.beta2 * v + (1 - settings.beta2) * squared
    else:
        v = v - (1 - settings.beta2) * squared * np.sign(v - squared)
    return _moved(adapter, lr * m / (np.sqrt(v) + settings.tau)), {"m": m, "v": v}


def _moved(adapter: Vector, by: NDArray[np.float64]) -> Vector:
    return (adapter + by).astype(np.float32)
