"""What the README shows of the command is what the command says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedgraft.common.aggregation import RULES
from fedgraft.common.methods import METHODS
from fedgraft.server.cli.jobs import TEMPLATES

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(
    r"```console\n\$ fedgraft ([a-z ]*--help)\n(.*?)```",
    (ROOT / "README.md").read_text(encoding="utf-8"),
    re.DOTALL,
)


def test_the_readme_shows_help() -> None:
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize(("arguments", "shown"), BLOCKS, ids=[block[0] for block in BLOCKS])
def test_help_blocks_are_the_real_help(arguments: str, shown: str) -> None:
    real = subprocess.run(
        [sys.executable, "-m", "fedgraft", *arguments.split()],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"},
    ).stdout
    assert squeezed(shown) == squeezed(real)


def squeezed(text: str) -> list[str]:
    """Lines without trailing blanks and without the program's own name for itself."""
    lines = [line.rstrip().replace("python -m fedgraft", "fedgraft") for line in text.splitlines()]
    return [line for line in lines if line]


def test_every_file_the_readme_links_to_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_readme_names_every_template() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if "fedgraft init job.toml --template" in line)
    named = re.search(r"--template (\w+) +# or ([\w, ]+):", line)
    assert named
    assert {named[1], *named[2].split(", ")} == TEMPLATES.keys()


def test_every_method_and_every_rule_is_named() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    named = re.search(r"what trains \((.*?)\), how updates combine \((.*?)\)", text)
    assert named is not None
    methods, rules = (set(re.findall(r"`([\w-]+)`", part)) for part in named.groups())
    assert methods == METHODS.keys() and rules == RULES.keys()
