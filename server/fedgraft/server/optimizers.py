"""Server optimisers: they use the merged update as a negative gradient.

Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 2, without bias correction as in the
paper:

    m <- b1 m + (1 - b1) D
    adam:  v <- b2 v + (1 - b2) D^2
    yogi:  v <- v - (1 - b2) D^2 sign(v - D^2)
    x <- x + lr m / (sqrt(v) + tau)

``momentum`` is FedAvgM (Hsu et al. 2019): m <- b1 m + D, x <- x + lr m. ``none``: x <- x + lr D.
``reptile`` is Reptile's outer step with the sites as a batch of tasks (Nichol et al. 2018, "On
First-Order Meta-Learning Algorithms", arXiv:1803.02999): x <- x + lr (1 - t/T) D, where t of T
rounds are done. The steps shrink, so that x settles at a point from which a few local steps improve
the model much.
"""

import numpy as np
from numpy.typing import NDArray

from fedgraft.common.config.sections import ServerOptimizer
from fedgraft.common.layout import Vector
from fedgraft.server.state import Moments

__all__ = ["apply"]


def apply(
    settings: ServerOptimizer,
    adapter: Vector,
    step: NDArray[np.float64],
    moments: Moments,
    *,
    done: float = 0.0,
) -> tuple[Vector, Moments]:
    """Move ``adapter`` (float32 [d]) by ``step`` (float64 [d]); return new adapter and moments.

    ``moments`` are those that the last call returned, empty at first. Nothing is changed in place.
    ``done`` is the share of the rounds that came before this one.
    """
    kind, lr = settings.kind, settings.learning_rate
    if kind == "none":
        return _moved(adapter, lr * step), {}
    if kind == "reptile":
        return _moved(adapter, lr * (1 - done) * step), {}
    m = moments.get("m", np.zeros_like(step))
    if kind == "momentum":
        m = settings.beta1 * m + step
        return _moved(adapter, lr * m), {"m": m}
    m = settings.beta1 * m + (1 - settings.beta1) * step
    squared = step**2
    # tau^2 as in the paper: a zero would let a coordinate start with an unbounded step
    v = moments.get("v", np.full_like(step, settings.tau**2))
    if kind == "adam":
        v = settings.beta2 * v + (1 - settings.beta2) * squared
    else:
        v = v - (1 - settings.beta2) * squared * np.sign(v - squared)
    return _moved(adapter, lr * m / (np.sqrt(v) + settings.tau)), {"m": m, "v": v}


def _moved(adapter: Vector, by: NDArray[np.float64]) -> Vector:
    return (adapter + by).astype(np.float32)
