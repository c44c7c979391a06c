"""Every check of secure aggregation, taken out one at a time, and whether a test notices.

A mutant is a module whose syntax tree lacks one check. It is compiled in a process forked from one
that has imported all that stays the same; nothing is written next to the sources.
"""

import ast
import copy
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("common", "client", "server", "simulations", "tests")
PARTIES = (
    "client/fedgraft/client/secagg/stage_log.py",
    "client/fedgraft/client/secagg/round_secrets.py",
    "client/fedgraft/client/secagg/masking_party.py",
    "server/fedgraft/server/protocol/unmasking_server.py",
)
TESTS = ("tests/common/secagg/test_*.py", "tests/secagg/test_*.py", "tests/client/secagg/test_*.py")
LIKELY = {  # which tests miss a check of the two parties; of another module those of its name
    "masking_party": ("test_cheating_coordinator", "test_cheating_with_survivors"),
    "unmasking_server": ("test_cheating_site", "test_cheating_with_shares"),
}
CPU_SECONDS = 120  # the tests need 20; what takes so long hangs
WALL_SECONDS = 900  # and what waits for ever, on a busy machine too

# Functions called for nothing but what they raise; those that also give back what they checked.
BARE = re.compile(r"check_\w+|verify|agree|_need|_claim|claim")
PASSING = re.compile(r"check_bytes|_member|check_advertisements")
GUARD = re.compile(r"fewest")  # names of thresholds made of several


def sources() -> list[Path]:
    """The modules whose checks are taken out."""
    common = (ROOT / "common/fedgraft/common/secagg").glob("*.py")
    return [*(ROOT / party for party in PARTIES), *sorted(common)]


@dataclass(frozen=True)
class Mutant:
    """One check of one module; ``key`` is free of line numbers, so that it outlives edits."""

    path: Path
    line: int
    key: str

    @property
    def name(self) -> str:
        """``file:line: text of the check``."""
        file, _, text = self.key.split(": ", 2)
        return f"{file}:{self.line}: {text}"


@dataclass(frozen=True)
class _Change:
    line: int
    apply: Callable[[], None]


def find_mutants(path: Path) -> list[Mutant]:
    """All mutants of a module, in the order of its text."""
    changes = _changes(_parse(path), path)
    return [Mutant(path, change.line, key) for key, change in changes.items()]


def compile_mutant(path: Path, key: str) -> CodeType:
    """The module without one check; KeyError if it has no such check (any more)."""
    tree = _parse(path)
    _changes(tree, path)[key].apply()
    return compile(ast.fix_missing_locations(tree), str(path), "exec")


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _changes(tree: ast.Module, path: Path) -> dict[str, _Change]:
    """What can be taken out, by key: file, function, what kind of check, its text."""
    file = "/".join(path.relative_to(ROOT).parts[2:])
    found: dict[str, _Change] = {}
    for owner, node in _statements(tree, ""):
        for kind, line, text, put in _at(node, owner):
            key = plain = f"{file}: {owner}: {kind} {text}"
            count = 1
            while key in found:
                count += 1
                key = f"{plain} #{count}"
            found[key] = _Change(line, put)
    return found


def _statements(node: ast.AST, owner: str) -> Iterator[tuple[str, ast.AST]]:
    """All nodes with the name of the function or class that they are in."""
    for child in ast.iter_child_nodes(node):
        inner = owner
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            inner = f"{owner}.{child.name}" if owner else child.name
        yield inner, child
        yield from _statements(child, inner)


_Found = tuple[str, int, str, Callable[[], None]]


def _at(node: ast.AST, owner: str) -> Iterator[_Found]:
    """The mutants that begin at this node."""
    name = owner.rpartition(".")[2]
    match node:
        case ast.If():
            yield from _of_if(node)
        case ast.FunctionDef() if _only_raises(node):
            yield "method", node.lineno, node.name, _putter(node, "name", f"_no_{node.name}")
        case ast.Lambda() if _called(node.body) == "same":
            yes = ast.Constant(True)
            yield "accept", node.lineno, ast.unparse(node), _putter(node, "body", yes)
        case ast.Return(value=ast.BoolOp()) if name.startswith("_"):  # a predicate
            yield from _parts(node, "value", "part")
        case ast.Return(value=ast.Call()) if GUARD.search(name):
            yield from _of_threshold(node.value)
        case ast.Assign() | ast.Expr():
            yield from _of_value(node)
    yield from _passed_through(node)


def _of_value(node: ast.Assign | ast.Expr) -> Iterator[_Found]:
    """A call for what it raises alone; a threshold made of several."""
    target = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""
    if target == "_" or (not target and BARE.fullmatch(_called(node.value))):
        yield "call", node.lineno, ast.unparse(node), _putter(node, "value", ast.Constant(None))
    elif GUARD.search(target):
        yield from _of_threshold(node.value)


def _of_threshold(value: ast.expr | None) -> Iterator[_Found]:
    if isinstance(value, ast.Call) and _called(value) == "max":
        for argument in value.args:
            rest = [other for other in value.args if other is not argument]
            text = ast.unparse(argument)
            yield "threshold without", value.lineno, text, _putter(value, "args", [*rest, *rest])


def _passed_through(node: ast.AST) -> Iterator[_Found]:
    """Values that a call in this node checks and gives back."""
    for field, value in () if isinstance(node, ast.Expr) else ast.iter_fields(node):
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, ast.Call) and PASSING.fullmatch(_called(item)):
                yield "value", item.lineno, ast.unparse(item), _swapper(node, field, item)


def _of_if(node: ast.If) -> Iterator[_Found]:
    text = ast.unparse(node.test)
    if isinstance(node.body[-1], ast.Raise | ast.Continue):
        yield "if", node.lineno, text, _putter(node, "test", ast.Constant(False))
        yield from _parts(node, "test", f"in `{text}`, without")
    if len(node.orelse) == 1 and isinstance(node.orelse[0], ast.Raise):
        yield "else after", node.lineno, text, _putter(node, "orelse", [ast.Pass()])


def _parts(node: ast.AST, field: str, kind: str) -> Iterator[_Found]:
    """Each operand of each ``and`` and ``or``, and each link of each chain, left out."""
    for inner in ast.walk(getattr(node, field)):
        if isinstance(inner, ast.BoolOp):
            joint, parts = inner.op, inner.values
        elif isinstance(inner, ast.Compare) and len(inner.ops) > 1:
            ends = [inner.left, *inner.comparators]
            links = zip(ends, inner.ops, ends[1:], strict=False)
            joint, parts = ast.And(), [ast.Compare(one, [op], [two]) for one, op, two in links]
        else:
            continue
        for part in parts:
            rest = [copy.deepcopy(other) for other in parts if other is not part]
            left = ast.BoolOp(joint, rest) if len(rest) > 1 else rest[0]
            yield kind, inner.lineno, ast.unparse(part), _replacer(node, field, inner, left)


def _called(node: ast.AST) -> str:
    if not isinstance(node, ast.Call):
        return ""
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _only_raises(node: ast.FunctionDef) -> bool:
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return len(body) == 1 and isinstance(body[0], ast.Raise)


def _putter(node: Any, field: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(node, field, value)


def _swapper(node: Any, field: str, call: ast.Call) -> Callable[[], None]:
    """The first argument in the place of a call that checks it and gives it back."""

    def put() -> None:
        held, plain = getattr(node, field), call.args[0]
        if _called(call) == "check_advertisements":
            given = f"{{said.site: said for said in {ast.unparse(plain)}}}"
            plain = ast.parse(given, mode="eval").body
        if isinstance(held, list):
            held[held.index(call)] = plain
        else:
            setattr(node, field, plain)

    return put


def _replacer(node: Any, field: str, old: ast.expr, new: ast.expr) -> Callable[[], None]:
    class Swap(ast.NodeTransformer):
        def visit(self, found: ast.AST) -> Any:
            return new if found is old else super().visit(found)

    return lambda: setattr(node, field, Swap().visit(getattr(node, field)))


# --- running the tests on a mutant ----------------------------------------------------------------
@dataclass(frozen=True)
class Outcome:
    """``killer`` is the test that failed, "" if all passed; ``seconds`` of processor time."""

    killer: str
    seconds: float


class Runner:
    """A process that forks one child for each mutant; a context manager."""

    def __init__(self, scratch: Path) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / room) for room in ROOMS)
        environment["PYTHONPYCACHEPREFIX"] = str(scratch / "compiled")
        environment["HYPOTHESIS_STORAGE_DIRECTORY"] = str(scratch / "hypothesis")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "secagg.mutation", str(scratch)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, mutant: Mutant | None) -> Outcome:
        """Run the tests, those of the module itself first, until one fails."""
        assert self._process.stdin and self._process.stdout
        order = [str(mutant.path), mutant.key] if mutant else None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def __enter__(self) -> "Runner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()


def test_files(path: Path | None) -> tuple[list[Path], list[Path]]:
    """The likely killers, then all tests of the protocol but them and the mutation test."""
    files = [file for pattern in TESTS for file in sorted(ROOT.glob(pattern))]
    files.sort(key=lambda file: file.stem in ("test_transcript", "test_protocol"))
    stems = LIKELY.get(path.stem, (f"test_{path.stem}",)) if path else ()
    rest = [file for file in files if file.stem not in (*stems, "test_mutation")]
    return [file for file in files if file.stem in stems], rest


class _Finder(MetaPathFinder):
    """Imports one module without one of its checks."""

    def __init__(self, path: Path, key: str) -> None:
        parts = path.relative_to(ROOT).with_suffix("").parts[1:]
        self._name = ".".join(part for part in parts if part != "__init__")
        self._path, self._key = path, key

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        key = self._key

        class Loader(SourceFileLoader):
            def get_code(self, fullname: str) -> CodeType:
                return compile_mutant(Path(self.path), key)

        return spec_from_file_location(
            fullname, self._path, loader=Loader(fullname, str(self._path))
        )


class _Witness:
    """A pytest plugin that remembers the first failure."""

    killer = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.killer = self.killer or (report.nodeid if report.failed else "")

    def pytest_collectreport(self, report: Any) -> None:
        self.killer = self.killer or (f"import of {report.nodeid}" if report.failed else "")


def _child(order: list[Any] | None, folder: Path, answer: int) -> None:
    """Import the mutant, run the tests, write who killed it to ``answer``."""
    import pytest
    from hypothesis import Phase, settings

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    signal.alarm(WALL_SECONDS)
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    settings.register_profile(
        "mutation", deadline=None, database=None, derandomize=True, max_examples=100,
        phases=(Phase.explicit, Phase.generate),
    )  # fmt: skip
    settings.load_profile("mutation")
    path = Path(order[0]) if order else None
    if path and order:
        sys.meta_path.insert(0, _Finder(path, order[1]))
    witness = _Witness()
    options = ["-x", "-q", "--tb=no", f"--rootdir={ROOT}", f"--basetemp={folder}"]
    options += ["-p", "no:cacheprovider", "-p", "no:xdist"]
    for files in test_files(path):
        if files and not witness.killer:
            code = pytest.main([*options, *map(str, files)], plugins=[witness])
            if code not in (0, 1, 2):
                witness.killer = f"pytest itself, code {int(code)}"
    os.write(answer, witness.killer.encode() or b"-")


def _serve(scratch: Path) -> None:
    """Read mutants from the standard input; each gets a process of its own."""
    import cryptography.hazmat.primitives.asymmetric.ed25519
    import cryptography.hazmat.primitives.asymmetric.x25519
    import cryptography.hazmat.primitives.ciphers.aead
    import cryptography.hazmat.primitives.kdf.hkdf
    import hypothesis.strategies
    import numpy as np

    np.random.default_rng(0)
    del cryptography, hypothesis
    for number, line in enumerate(sys.stdin):
        told, answer = os.pipe()
        child = os.fork()
        if not child:
            try:
                _child(json.loads(line), scratch / str(number), answer)
            finally:
                os._exit(0)
        os.close(answer)
        with os.fdopen(told, "rb") as stream:
            said = stream.read().decode()
        _, _, used = os.wait4(child, 0)
        killer = {"-": "", "": "the time limit"}.get(said, said)
        outcome = {"killer": killer, "seconds": used.ru_utime + used.ru_stime}
        print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
