"""The column of groups in a site's rows, for measuring how fair a model is to each group.

The groups are a fixed list in the job, so that their counts have the same length at every site. A
row without a group belongs to no group. A group that is not in the list is refused.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedgraft.client.data.files import READERS, Table, find_sources, read_tables
from fedgraft.common.config.data import Data
from fedgraft.common.errors import DataError
from fedgraft.common.tasks.base import composed

__all__ = ["NO_GROUP", "read_groups"]

NO_GROUP = -1


def read_groups(path: str, data: Data, columns: Mapping[str, str]) -> NDArray[np.int64]:
    """Return the group of every row at ``path``: int64 [rows], an index into ``data.groups`` or -1.

    ``columns`` maps the job's column to the site's, as for ``read_split``, which reads the same
    rows in the same order.

    Raises:
        DataError: the files are no tables, have no such column, or have a value that is not listed.
    """
    assert data.group is not None  # noqa: S101  # a job has group and groups, or neither
    column = columns.get(data.group, data.group)
    for source in find_sources(path):
        if source.suffix.lower() not in READERS:
            raise DataError(
                f"{source} is no table, and has no column {column!r} of groups",
                hint=f"write the rows into one of {', '.join(READERS)}, or leave data.group out",
            )
    tables = read_tables(path, content=column, label=None, images=False)
    places = [(table, row) for table in tables for row in range(len(table.contents))]
    return np.array([_group(*place, data.groups) for place in places], np.int64)


def _group(table: Table, row: int, groups: Sequence[str]) -> int:
    value = table.contents[row]
    if value is None or value == "":
        return NO_GROUP
    named = composed(int(value) if isinstance(value, float) and value.is_integer() else value)
    known = [composed(group) for group in groups]
    if named not in known:
        raise DataError(
            f"{table.place(row)}: its group is not one of data.groups",
            hint=f"the job lists {', '.join(groups)}; leave the cell empty if it is none of them",
        )
    return known.index(named)
