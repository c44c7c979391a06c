"""Real handwritten digits: the target domain of the demonstration, without a download.

The images are the test half of the Optical Recognition of Handwritten Digits set (E. Alpaydin and
C. Kaynak, UCI, 1998, CC BY 4.0), written by 13 people. They are part of scikit-learn.
"""

from functools import lru_cache

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["NAMES", "load"]

NAMES = [str(digit) for digit in range(10)]
"""The classes, in the order of their labels."""

MODALITY = "image"
_TEST_SHARE = 0.3
_FULL_INK = 16  # a value of the set is the number of inked samples in a block of 4 x 4


@lru_cache(maxsize=2)
def load(seed: int = 0) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return (train, test): 1,257 and 540 digits, split by `seed` with equal shares of each class.

    Columns are `image`, an 8 x 8 PIL image of mode L with white ink (255) on black (0), and
    `label`, a ClassLabel named "0" to "9". The same seed gives the same rows in the same order, and
    in one process the same data sets.
    """
    # Imported here, because otherwise it would cost every worker of all simulations 70 MB.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / _FULL_INK)).astype(np.uint8)
    train, test = train_test_split(
        np.arange(len(pixels)), test_size=_TEST_SHARE, stratify=bunch.target, random_state=seed
    )
    return _table(pixels[train], bunch.target[train]), _table(pixels[test], bunch.target[test])


def _table(pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> datasets.Dataset:
    features = datasets.Features(
        {"image": datasets.Image(mode="L"), "label": datasets.ClassLabel(names=NAMES)}
    )
    columns = {"image": [Image.fromarray(image) for image in pixels], "label": labels.tolist()}
    return datasets.Dataset.from_dict(columns, features=features)
