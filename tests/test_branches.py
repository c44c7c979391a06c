"""A task, rule, method or modality is known in its own file; branches elsewhere are counted.

A new task must need none. A branch that somebody adds fails here; those that are left stand below,
each with its reason.
"""

import ast
import re
from collections.abc import Iterator

from support.sources import ROOT, SOURCES, place, tree

from fedgraft.client.objectives import OBJECTIVES
from fedgraft.common.aggregation import RULES
from fedgraft.common.methods import METHODS
from fedgraft.common.modalities import MODALITIES
from fedgraft.common.tasks import TASKS

OWN = ("tasks", "modalities", "aggregation", "methods")  # wings of common with a table of these
NAMES = {*TASKS, *MODALITIES, *RULES, *METHODS, *OBJECTIVES}
ABOUT = {"task", "modality", "target", "rule", "method", "kind", "name", "labelled", "pipeline"}

LEFT: dict[str, str] = {
    "simulations/selection/rank.py: self.job.task.modality.name == DUAL_MODALITY": (
        "a dual encoder has one encoder of texts and one of images: no other modality can have one"
    ),
}


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Yield every file but those of the tables themselves, with its syntax tree."""
    own = tuple(f"common/{wing}/" for wing in OWN)
    for path in SOURCES:
        if not place(path).startswith(own):
            yield place(path), tree(path)


def imported(module: ast.Module) -> set[str]:
    """Names that a module imports from the wings that have the tables, and from metrics."""
    wings = tuple(f"fedgraft.common.{wing}" for wing in (*OWN, "metrics"))
    return {
        alias.asname or alias.name
        for node in ast.walk(module)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(wings)
        for alias in node.names
    }


def names_in(node: ast.AST) -> set[str]:
    return {
        one.attr if isinstance(one, ast.Attribute) else one.id
        for one in ast.walk(node)
        if isinstance(one, ast.Attribute | ast.Name)
    }


def strings_in(node: ast.AST) -> set[str]:
    return {str(one.value) for one in ast.walk(node) if isinstance(one, ast.Constant)} & NAMES


def branches(module: ast.Module) -> Iterator[str]:
    """Comparisons with a name of a table, ``isinstance`` of its classes, looks at a method."""
    classes = imported(module)
    for node in ast.walk(module):
        if isinstance(node, ast.Compare):
            about = names_in(node) & ABOUT
            constant = any(name.isupper() for name in names_in(node)) and "modality" in about
            if about and (strings_in(node) or constant):
                yield ast.unparse(node)
        elif isinstance(node, ast.Match):
            if names_in(node.subject) & ABOUT:
                yield f"match {ast.unparse(node.subject)}"
        elif isinstance(node, ast.Call) and len(node.args) > 1:
            called = ast.unparse(node.func)
            typed = called == "isinstance" and names_in(node.args[1]) & classes
            owners = names_in(node.args[0]) & {"method", "task", "rule"}
            if typed or (called in ("getattr", "hasattr") and owners):
                yield ast.unparse(node)


def test_branches_on_a_table_elsewhere_are_those_that_are_left() -> None:
    found = {f"{name}: {branch}" for name, module in sources() for branch in branches(module)}
    assert found == set(LEFT)


def test_templates_have_no_branch_either() -> None:
    names = "|".join(map(re.escape, NAMES))
    pattern = re.compile(rf"""(?:==|!=|\bin)\s*\(?["'](?:{names})["']""")
    pages = [*ROOT.glob("*/fedgraft/**/*.j2")]
    assert len(pages) >= 9
    found = [
        f"{page.name}: {line.strip()}"
        for page in pages
        for line in page.read_text(encoding="utf-8").splitlines()
        if pattern.search(line)
    ]
    assert not found


def test_a_branch_would_be_found() -> None:
    forms = (
        "job.task.name == 'causal-lm'",
        "task.target != 'label'",
        "job.method.kind in ('lora', 'head')",
        "isinstance(one, PartEvaluation)",
        "getattr(job.method, 'rank', 0)",
        "modality.name == SEEN",
    )
    for form in forms:
        text = f"from fedgraft.common.metrics.part_evaluation import PartEvaluation\nx = {form}"
        assert list(branches(ast.parse(text))), form


def test_literals_of_a_job_are_the_keys_of_the_tables() -> None:
    from typing import get_args

    from fedgraft.common.aggregation import RuleName
    from fedgraft.common.tasks import TaskName

    assert get_args(TaskName) == tuple(TASKS)
    assert get_args(RuleName) == tuple(RULES)
    assert {task.target for task in TASKS.values()} == set(OBJECTIVES)
    assert all(task.name == name for name, task in TASKS.items())
    assert all(modality.name == name for name, modality in MODALITIES.items())
