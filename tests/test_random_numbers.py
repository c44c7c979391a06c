"""Random numbers come from generators that are handed on, never from global ones."""

import ast
from collections.abc import Iterator

import pytest
from support.sources import SOURCES, place, tree


def test_no_global_random_generator() -> None:
    """Random numbers come from seeds.py; global state would tie sites to each other."""
    found = {place(path): [*global_draws(tree(path))] for path in SOURCES}
    assert {path: draws for path, draws in found.items() if draws} == {}


def global_draws(code: ast.Module) -> Iterator[str]:
    """Yield the expressions that draw from a generator of the whole process."""
    banned = {"seed", "manual_seed", "randn", "randint", "shuffle", "random", "normal", "rand"}
    torchs = {"rand", "randn", "randint", "randperm"}
    of_torch = {f"torch.{name}" for name in torchs}
    for node in ast.walk(code):
        if isinstance(node, ast.Attribute) and node.attr in banned:
            owner = ast.unparse(node.value)
            if owner in ("np.random", "numpy.random", "random") or (
                owner == "torch" and node.attr not in {*torchs, "random"}
            ):
                yield ast.unparse(node)
        if isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {one.arg for one in node.keywords}
            if name in of_torch and "generator" not in given:
                yield ast.unparse(node)


@pytest.mark.parametrize(
    ("code", "draws"),
    [
        ("np.random.seed(0)", 1),
        ("torch.manual_seed(0)", 1),
        ("torch.rand(3)", 1),
        ("torch.rand(3, generator=g)", 0),
        ("generator.normal(3)", 0),
    ],
)
def test_global_draws_are_seen(code: str, draws: int) -> None:
    assert len([*global_draws(ast.parse(code))]) == draws
