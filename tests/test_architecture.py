"""The tables of wings in docs/architecture.md say what the table of imports says."""

import re

import pytest
from support.sources import ROOMS, ROOT
from test_layout import WINGS

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def names_in(cell: str) -> set[str]:
    """Return the wings that a cell of a table names, without ``/`` and ``.py``."""
    named = re.findall(r"`([a-z_]+(?:/|\.py)?)`", cell)
    return {name.rstrip("/").removesuffix(".py") for name in named}


def rows_of(room: str) -> dict[str, set[str]]:
    """Return the wings that each wing of the room imports, of the same room, by the page."""
    table = PAGE.partition(f"\n### {room}\n")[2].partition("\n##")[0]
    found: dict[str, set[str]] = {}
    for line in table.splitlines():
        if line.startswith("| `"):
            wings, _, imported = line.strip("| ").split(" | ")
            own = imported.partition("; of `")[0]
            found |= {wing: names_in(own) for wing in names_in(wings)}
    return found


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "common"])
def test_the_page_names_what_each_wing_imports(room: str) -> None:
    wanted: dict[str, set[str]] = {}
    for row, text in WINGS.items():
        if row.startswith(f"{room}/"):
            named = (name if "/" in name else f"{room}/{name}" for name in text.split())
            own = {name.partition("/")[2] for name in named if name.startswith(f"{room}/")}
            wanted[row.partition("/")[2]] = own
    assert rows_of(room) == wanted
