"""The rules of the house, checked: rooms, import directions, who may touch what, file sizes."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("common", "client", "server", "simulations")
MAY_IMPORT = {
    "common": {"common"},
    "client": {"client", "common"},
    "server": {"server", "common"},
    "simulations": set(ROOMS),
}
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
MADE = ("_pb2.py", "_pb2_grpc.py")  # by protoc
SOURCES = sorted(
    path
    for room in ROOMS
    for path in (ROOT / room / "fedgraft").rglob("*.py")
    if not path.name.endswith(MADE)
)
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))


def place(path: Path) -> str:
    """``common/fedgraft/common/config/job.py`` as ``common/job.py``."""
    return str(path.relative_to(ROOT / path.relative_to(ROOT).parts[0] / "fedgraft"))


def imports(path: Path, *, anywhere: bool) -> Iterator[str]:
    """Names of imported modules: at the top of the file, or ``anywhere`` in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@each_source
def test_imports_follow_the_direction_of_the_rooms(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    used = {n.split(".")[1] for n in imports(path, anywhere=True) if n.startswith("fedgraft.")}
    assert used <= MAY_IMPORT[room]


@each_source
def test_only_the_edges_speak_flower(path: Path) -> None:
    speaks = any(name.split(".")[0] == "flwr" for name in imports(path, anywhere=True))
    assert not speaks or place(path) in FLOWER


@pytest.mark.parametrize("path", [p for p in SOURCES if "cli" in p.stem], ids=place)
def test_no_cli_module_imports_torch_at_the_top(path: Path) -> None:
    heavy = {"torch", "transformers", "peft", "datasets", "flwr", "numpy"}
    assert not heavy & {name.split(".")[0] for name in imports(path, anywhere=False)}


def is_protocol(path: Path) -> bool:
    """Secure aggregation itself: both state machines, and what they compute alike."""
    name = place(path)
    return name.startswith("common/secagg/") or name in PROTOCOL


@pytest.mark.parametrize("path", [p for p in SOURCES if is_protocol(p)], ids=place)
def test_the_protocol_rests_on_little_and_touches_nothing(path: Path) -> None:
    for name in imports(path, anywhere=True):
        first = name.split(".")[0]
        ours = (
            name.startswith("fedgraft.common.secagg")
            or name == "fedgraft.client.secagg.round_secrets"
        )
        assert first in sys.stdlib_module_names | {"numpy", "cryptography"} or ours, name
        assert first not in INPUT_AND_OUTPUT, name
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("open", "print", "input"), ast.unparse(node)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os":
            assert node.attr == "urandom"


@each_source
def test_no_global_random_generator(path: Path) -> None:
    """Random numbers come from seeds.py; global state would tie sites to each other."""
    banned = {"seed", "manual_seed", "randn", "randint", "shuffle", "random", "normal", "rand"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in banned:
            owner = ast.unparse(node.value)
            assert owner not in ("np.random", "numpy.random", "random"), ast.unparse(node)
            if owner == "torch":
                assert node.attr in ("rand", "randn", "randint", "random"), ast.unparse(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "torch.rand",
            "torch.randn",
            "torch.randint",
            "torch.randperm",
        ):
            given = {keyword.arg for keyword in node.keywords}
            assert "generator" in given, ast.unparse(node)


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))], ids=str)
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("room", ROOMS)
def test_the_namespace_root_has_no_init(room: str) -> None:
    assert not (ROOT / room / "fedgraft" / "__init__.py").exists()


def test_the_flower_app_carries_no_code_and_our_version() -> None:
    app = tomllib.loads((ROOT / "deploy/app/pyproject.toml").read_text(encoding="utf-8"))
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert [path.name for path in (ROOT / "deploy/app").iterdir()] == ["pyproject.toml"]
    assert app["project"]["version"] == ours["project"]["version"]


def test_every_job_file_in_the_repository_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedgraft.common.config.jobfile import load_job

    monkeypatch.setenv("FEDGRAFT_DATA", "/nowhere")
    jobs = [*ROOT.glob("simulations/**/*.toml"), *ROOT.glob("server/**/templates/*.toml")]
    assert len(jobs) >= 3
    for path in jobs:
        load_job(path)
