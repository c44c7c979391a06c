"""The source files of the house, and what each imports: the rules of the house are about them."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

__all__ = [
    "MODULES",
    "ROOMS",
    "ROOT",
    "SOURCES",
    "imports",
    "is_of_a_room",
    "module",
    "place",
    "tree",
    "used",
    "used_when_run",
    "wing",
]

ROOT = Path(__file__).parents[2]
ROOMS = ("common", "client", "server", "simulations")
MADE = ("_pb2.py", "_pb2_grpc.py")  # by protoc
SOURCES = sorted(
    path
    for room in ROOMS
    for path in (ROOT / room / "fedgraft").rglob("*.py")
    if not path.name.endswith(MADE)
)


def place(path: Path) -> str:
    """``common/fedgraft/common/config/job.py`` as ``common/config/job.py``."""
    return str(path.relative_to(ROOT / path.relative_to(ROOT).parts[0] / "fedgraft"))


def module(path: Path) -> str:
    """``common/fedgraft/common/config/job.py`` as ``fedgraft.common.config.job``."""
    name = place(path).removesuffix(".py").removesuffix("/__init__")
    return f"fedgraft.{name}".replace("/", ".")


MODULES = {module(path): path for path in SOURCES}


def wing(path: Path) -> str:
    """The wing of a file: a package of a room as ``common/config``, or a module at its root."""
    return "/".join(module(path).split(".")[1:3])


def is_of_a_room(path: Path) -> bool:
    """Whether a file is a room's own package: ``fedgraft.common`` itself."""
    return wing(path) in ROOMS


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, *, anywhere: bool) -> Iterator[str]:
    """Names of imported modules: at the top of the file, or ``anywhere`` in it."""
    for node in ast.walk(tree(path)) if anywhere else tree(path).body:
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@cache
def used(path: Path) -> frozenset[str]:
    """Our modules that a file imports anywhere, for types alone too."""
    return _but(path, {name for node in ast.walk(tree(path)) for name in _named(node)})


def used_when_run(path: Path) -> frozenset[str]:
    """Our modules that a file imports, but for what only a type checker reads."""

    def visit(node: ast.AST) -> Iterator[str]:
        yield from _named(node)
        for child in ast.iter_child_nodes(node):
            if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
                yield from visit(child)

    return _but(path, set(visit(tree(path))))


def _but(path: Path, names: set[str]) -> frozenset[str]:
    return frozenset((names & MODULES.keys()) - {module(path)})


def _named(node: ast.AST) -> Iterator[str]:
    """Modules that an import may name, also as ``from fedgraft.common import cli``."""
    if isinstance(node, ast.ImportFrom):
        assert not node.level, "imports name the whole path"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name if name in MODULES else str(node.module) for name in names)
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
