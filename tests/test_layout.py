"""The rules of the house, checked: rooms, wings, who imports and touches what, file sizes."""

import ast
import subprocess
import sys
import tomllib
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from support.sources import (
    MODULES,
    ROOMS,
    ROOT,
    SOURCES,
    imports,
    is_of_a_room,
    place,
    tree,
    used,
    used_when_run,
    wing,
)

MAY_IMPORT = {
    "common": {"common"},
    "client": {"client", "common"},
    "server": {"server", "common"},
    "simulations": set(ROOMS),
}
# A wing is a package of a room, or a module at a room's root. A row names all wings that its wing
# imports, those of its own room without the room's name. BASE goes without saying. Rows stand in
# the order of building: a wing may import only what is above it.
BASE = {"common/errors", "common/files", "common/section", "common/seeds", "common/toml"}
WINGS = {
    # common
    "common/errors": "",
    "common/section": "",
    "common/seeds": "",
    "common/files": "errors",
    "common/toml": "errors",
    "common/witness": "",
    "common/console": "",
    "common/cli": "console",
    "__main__": "common/cli",
    "common/secagg": "",
    "common/rpc": "",
    "common/examples": "",
    "common/encoding": "examples",
    "common/layout": "",
    "common/modalities": "examples encoding",
    "common/metrics": "examples",
    "common/tasks": "examples encoding modalities metrics",
    "common/methods": "",
    "common/aggregation": "layout",
    "common/privacy": "secagg",
    "common/config": "encoding metrics tasks methods aggregation privacy",
    "common/federation": "secagg",
    "common/backbones": "layout tasks config",
    "common/cifar_resnet": "backbones",
    "common/messages": "secagg layout metrics config",
    "common/adapters": "witness layout metrics tasks methods config backbones messages",
    # client
    "client/site_config": "",
    "client/objectives": "common/examples",
    "client/secagg": "common/secagg",
    "client/membership": (
        "common/secagg common/rpc common/config common/federation common/backbones common/messages"
    ),
    "client/data": (
        "site_config common/witness common/examples common/encoding common/tasks common/methods "
        "common/config common/backbones common/adapters"
    ),
    "client/policy": (
        "membership common/secagg common/rpc common/layout common/metrics common/methods "
        "common/privacy common/config common/federation common/messages common/adapters"
    ),
    "client/model": (
        "objectives data common/examples common/layout common/config common/backbones "
        "common/adapters"
    ),
    "client/training": (
        "objectives data model common/examples common/layout common/metrics common/tasks "
        "common/config common/backbones common/adapters"
    ),
    "client/selection": "data model common/examples common/metrics common/backbones",
    "client/participant": (
        "site_config membership data policy model training common/examples common/layout "
        "common/metrics common/config common/federation common/messages common/adapters"
    ),
    "client/masked_participant": (
        "secagg membership training participant common/secagg common/config common/messages"
    ),
    "client/results": (
        "training participant common/examples common/layout common/metrics common/tasks "
        "common/config common/backbones common/messages common/adapters"
    ),
    "client/app": (
        "policy training participant masked_participant results common/secagg common/messages"
    ),
    "client/doctor": (
        "site_config membership data policy model training common/rpc common/examples "
        "common/tasks common/config common/federation common/backbones common/adapters"
    ),
    "client/agent": "site_config membership policy results app common/messages",
    "client/cli": (
        "site_config membership policy participant results doctor agent common/console "
        "common/config common/federation common/backbones"
    ),
    # server
    "server/paths": "",
    "server/state": "common/metrics common/config",
    "server/optimizers": "state common/layout common/config",
    "server/protocol": (
        "state common/secagg common/layout common/metrics common/aggregation common/config "
        "common/federation common/messages"
    ),
    "server/plan": (
        "protocol common/layout common/aggregation common/config common/messages common/adapters"
    ),
    "server/rounds": (
        "state optimizers protocol plan common/layout common/metrics common/aggregation "
        "common/config common/messages"
    ),
    "server/enrollment": "common/secagg common/rpc common/federation common/backbones",
    "server/report": "common/metrics common/tasks",
    "server/jobs": "paths enrollment common/config common/backbones",
    "server/monitoring": "report",
    "server/runs": (
        "state plan common/examples common/secagg common/layout common/privacy common/config "
        "common/backbones common/messages common/adapters"
    ),
    "server/delivery": "protocol plan runs common/layout common/messages",
    "server/export": (
        "state runs common/encoding common/layout common/modalities common/config "
        "common/backbones common/adapters"
    ),
    "server/coordinator": "paths enrollment jobs runs common/rpc common/backbones common/messages",
    "server/app": (
        "state protocol plan rounds report runs delivery export coordinator common/layout "
        "common/config common/federation common/adapters"
    ),
    "server/cli": (
        "paths plan enrollment report jobs monitoring runs export coordinator common/console "
        "common/rpc common/config common/federation common/messages common/adapters"
    ),
    # simulations
    "simulations/faults": "common/examples common/layout common/config common/messages",
    "simulations/demo": "",
    "simulations/data": (
        "faults demo common/examples common/modalities common/tasks common/config "
        "client/site_config client/data"
    ),
    "simulations/grid": (
        "data common/layout common/config common/federation client/membership client/data "
        "client/model client/participant client/app server/state server/protocol server/runs "
        "server/app"
    ),
    "simulations/baselines": (
        "data grid common/examples common/layout common/metrics common/tasks common/methods "
        "common/config common/messages common/adapters client/data client/model client/training "
        "client/participant client/results"
    ),
    "simulations/selection": (
        "data grid baselines common/console common/metrics common/config common/backbones "
        "common/adapters client/data client/model client/selection client/participant"
    ),
    "simulations/preparation": (
        "data grid baselines common/console common/config common/adapters client/model "
        "client/training client/participant server/plan"
    ),
    "simulations/simulate": (
        "faults data grid baselines common/console common/layout common/metrics common/config "
        "common/messages common/adapters server/state server/protocol server/plan server/rounds "
        "server/report server/runs server/export server/app"
    ),
    "simulations/sweep": (
        "baselines preparation simulate common/console common/metrics common/config server/state "
        "server/report server/runs"
    ),
    "simulations/cli": (
        "selection preparation simulate sweep common/console common/metrics common/tasks "
        "common/config server/report server/runs server/cli"
    ),
}
MOST_MODULES = 12  # of a wing, or at a room's root: more are not surveyed at a glance
# Flower's API moves: only these speak it.
FLOWER = {
    "common/messages/codec.py",
    "common/messages/flower_objects.py",
    "common/messages/signatures.py",
    "client/agent/process.py",
    "client/app.py",
    "client/agent/superlink_session.py",
    "server/app.py",
    "server/coordinator/superlink.py",
    "server/protocol/transport.py",
    "simulations/faults/grid.py",
    "simulations/grid/local_grid.py",
    "simulations/grid/ray.py",
}
PROTOCOL = {
    "client/secagg/masking_party.py",
    "client/secagg/round_secrets.py",
    "server/protocol/unmasking_server.py",
}
INPUT_AND_OUTPUT = {"pathlib", "logging", "socket", "subprocess", "shutil", "tempfile", "random"}
HEAVY = {"torch", "transformers", "peft", "datasets"}  # seconds to import
each_room = pytest.mark.parametrize("room", ROOMS)


def sources_of(room: str) -> list[Path]:
    """Return the modules of a room."""
    return [path for path in SOURCES if path.relative_to(ROOT).parts[0] == room]


def full(row: str, name: str) -> str:
    """A wing as a row names it, with its room."""
    return name if "/" in name else f"{row.partition('/')[0]}/{name}"


# --- wings


def test_every_wing_has_a_row_and_every_row_a_wing() -> None:
    assert {wing(path) for path in SOURCES if not is_of_a_room(path)} == {*WINGS}


@pytest.mark.parametrize("path", [p for p in SOURCES if is_of_a_room(p)], ids=place)
def test_the_package_of_a_room_imports_nothing_of_ours(path: Path) -> None:
    assert not used(path)


@pytest.mark.parametrize("row", WINGS)
def test_a_wing_imports_what_its_row_names_and_its_row_names_no_more(row: str) -> None:
    found: dict[str, list[str]] = {}
    for path in (path for path in SOURCES if wing(path) == row):
        for name in used(path):
            found.setdefault(wing(MODULES[name]), []).append(place(path))
    found.pop(row, None)
    named = {full(row, name) for name in WINGS[row].split()}
    unsaid = set() if row in BASE else BASE
    assert not named & unsaid, "these go without saying"
    more = {name: files for name, files in found.items() if name not in named | unsaid}
    assert not more, f"{row} imports what its row does not name: {more}"
    unused = named - found.keys()
    assert not unused, f"nothing in {row} imports {unused}: strike it from the row"


@pytest.mark.parametrize("row", WINGS)
def test_a_wing_stands_on_rows_above_it(row: str) -> None:
    """So no wings import each other in a circle, and the table is read from the ground up."""
    rows = list(WINGS)
    assert {full(row, name) for name in WINGS[row].split()} <= {*rows[: rows.index(row)]}


def test_no_module_imports_itself_by_way_of_others() -> None:
    try:
        TopologicalSorter({name: used_when_run(path) for name, path in MODULES.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {error.args[1]}")


def test_no_wing_is_too_large_for_a_glance() -> None:
    counts = Counter(str(Path(place(path)).parent) for path in SOURCES if path.stem != "__init__")
    assert {where: count for where, count in counts.items() if count > MOST_MODULES} == {}


# --- rooms


@pytest.mark.parametrize("room", ROOMS)
def test_the_namespace_root_has_no_init(room: str) -> None:
    assert not (ROOT / room / "fedgraft" / "__init__.py").exists()


@each_room
def test_imports_follow_the_direction_of_the_rooms(room: str) -> None:
    for path in sources_of(room):
        ours = [name for name in imports(path, anywhere=True) if name.startswith("fedgraft.")]
        assert {name.split(".")[1] for name in ours} <= MAY_IMPORT[room], place(path)


@each_room
def test_only_the_table_of_verbs_imports_by_a_name_in_a_string(room: str) -> None:
    """The rules above do not see such imports."""
    for path in sources_of(room):
        if place(path) == "common/cli.py":
            continue
        for node in ast.walk(tree(path)):
            names = {getattr(node, field, None) for field in ("id", "attr", "name")}
            assert not names & {"import_module", "__import__", "resolve_name"}, place(path)
        if room != "simulations":
            assert "fedgraft.simulations" not in path.read_text(encoding="utf-8"), place(path)


# --- what is imported when


def loaded(script: str) -> set[str]:
    """The names of modules that a fresh interpreter has loaded after ``script``."""
    path = [str(ROOT / room) for room in ROOMS]
    script = f"import sys; sys.path[:0] = {path}\n{script}\nprint('loaded:', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("loaded:")[2].split())


def test_a_job_is_read_without_torch() -> None:
    script = "import fedgraft.common.config.job, fedgraft.common.config.jobfile"
    assert HEAVY & loaded(script) == set()


def test_the_help_of_verbs_loads_nothing_heavy() -> None:
    script = """
from fedgraft.common.cli import VERBS, command
for verb in VERBS:
    command([*verb.split(), "--help"], standalone_mode=False)
"""
    assert {*HEAVY, "flwr", "numpy", "sklearn"} & loaded(script) == set()


def is_of_verbs(path: Path) -> bool:
    """A module of verbs, or the table of them."""
    return path.parent.name == "cli" or path.stem == "cli"


@pytest.mark.parametrize("path", [p for p in SOURCES if is_of_verbs(p)], ids=place)
def test_no_cli_module_imports_torch_at_the_top(path: Path) -> None:
    heavy = {*HEAVY, "flwr", "numpy"}
    assert not heavy & {name.split(".")[0] for name in imports(path, anywhere=False)}


# --- who may touch what


def test_the_edges_and_nobody_else_speak_flower() -> None:
    def speaks(path: Path) -> bool:
        return any(name.split(".")[0] == "flwr" for name in imports(path, anywhere=True))

    assert {place(path) for path in SOURCES if speaks(path)} == FLOWER


def test_every_module_of_the_protocol_exists() -> None:
    assert {place(path) for path in SOURCES} >= PROTOCOL


def is_protocol(path: Path) -> bool:
    """Secure aggregation itself: both state machines, and what they compute alike."""
    name = place(path)
    return name.startswith("common/secagg/") or name in PROTOCOL


@pytest.mark.parametrize("path", [p for p in SOURCES if is_protocol(p)], ids=place)
def test_the_protocol_rests_on_little_and_touches_nothing(path: Path) -> None:
    for name in imports(path, anywhere=True):
        first = name.split(".")[0]
        own = (
            name.startswith("fedgraft.common.secagg")
            or name == "fedgraft.client.secagg.round_secrets"
        )
        assert first in sys.stdlib_module_names | {"numpy", "cryptography"} or own, name
        assert first not in INPUT_AND_OUTPUT, name
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("open", "print", "input"), ast.unparse(node)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os":
            assert node.attr == "urandom"


def test_files_can_be_read_in_one_sitting() -> None:
    files = [*SOURCES, *(ROOT / "tests").rglob("*.py")]
    lines = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {path: count for path, count in lines.items() if count > 400} == {}


def test_the_flower_app_carries_no_code_and_our_version() -> None:
    app = tomllib.loads((ROOT / "deploy/app/pyproject.toml").read_text(encoding="utf-8"))
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert [path.name for path in (ROOT / "deploy/app").iterdir()] == ["pyproject.toml"]
    assert app["project"]["version"] == ours["project"]["version"]
