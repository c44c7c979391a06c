"""Numbers in cells, as they stand there: nothing is guessed, and no cell is repeated."""

import re
from decimal import Decimal

from fedgraft.common.errors import DataError
from fedgraft.common.tasks.base import Cell

__all__ = ["OUTSIDE", "UNIT", "read_number"]

OUTSIDE = "the target is outside of {:g} to {:g}"
UNIT = "data.lowest and data.highest in the job, or another unit at this site"
# Python's float also reads 1_5, and digits of other scripts.
WRITTEN = re.compile(
    r"\s*[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|inf|infinity)\s*", re.ASCII | re.IGNORECASE
)


def read_number(cell: Cell) -> float:
    """Return the target beside a content; it may be infinite or NaN.

    Raises:
        DataError: it is no number, or does not fit into a float.
    """
    value = cell.beside
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError("no number as target", hint="fill it in or remove the row")
    if isinstance(value, str) and not cell.typed:
        if WRITTEN.fullmatch(value):
            return float(value)
        raise DataError(
            "the target is no number", hint="write digits with a decimal point, and no unit: 3.5"
        )
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise DataError(
            f"the target is of the type {type(value).__name__}, and no number",
            hint="write it as a number, without quotes: 3.5",
        )
    try:
        return float(value)
    except OverflowError:
        raise DataError("the target is too large", hint=UNIT) from None
