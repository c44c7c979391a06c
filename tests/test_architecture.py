"""The tables of wings in docs/architecture.md say what the table of imports says."""

import re

import pytest
from support.sources import ROOMS, ROOT, SOURCES, place
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


def named_code() -> list[tuple[str, str]]:
    """Return what the page names as ``file.py: name``, as (file, name)."""
    found = re.findall(r"`([\w/]+\.py):\s+([^`]+)`", PAGE)
    return [(file, name) for file, names in found for name in re.split(r",\s+", names)]


@pytest.mark.parametrize(("file", "name"), named_code())
def test_what_the_page_names_is_there(file: str, name: str) -> None:
    meant = [path for path in SOURCES if f"/{place(path)}".endswith(f"/{file}")]
    assert meant, f"no {file}"
    for part in name.split("."):
        defined = re.compile(rf"\b(?:def|class) {part}\b|^ *{part}\b.*[:=]", re.MULTILINE)
        assert any(defined.search(path.read_text(encoding="utf-8")) for path in meant), part


def test_the_page_names_much() -> None:
    assert len(named_code()) > 50
