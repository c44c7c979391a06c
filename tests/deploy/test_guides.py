"""The guides: links that lead somewhere, and files that fedgraft would read as they are shown."""

import inspect
import re
import tomllib
from pathlib import Path

import pytest

from fedgraft.client.policy.policy_file import _rules, load_policy
from fedgraft.client.site_config import load_site
from fedgraft.server.enrollment.provision import POLICY, load_federation_spec

ROOT = Path(__file__).parents[2]
GUIDES = sorted((ROOT / "docs").glob("*.md"))
each_guide = pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)


def read(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def tables(name: str) -> list[str]:
    """The TOML blocks of a guide, hashes that are only hinted at filled in."""
    found = re.findall(r"```toml\n(.*?)```", read(name), re.DOTALL)
    return [block.replace("sha256:...", "sha256:" + "0" * 64) for block in found]


def anchors(path: Path) -> set[str]:
    """What headings can be linked as."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


@each_guide
def test_links_lead_somewhere(guide: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", guide.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (guide.parent / file).resolve() if file else guide
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_guide
def test_files_of_deploy_that_it_names_are_there(guide: Path) -> None:
    for named in re.findall(r"(?<![\w/.])deploy/[\w./-]+\w", guide.read_text(encoding="utf-8")):
        assert (ROOT / named).exists(), named


@each_guide
def test_toml_is_toml(guide: Path) -> None:
    for block in tables(guide.name):
        tomllib.loads(block)


def test_the_policy_and_the_site_are_ones_that_a_site_reads(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(tables("privacy-officer.md")[0])
    assert load_policy(tmp_path / "policy.toml").privacy.min_examples == 200
    text = tables("site-operator.md")[0]
    (tmp_path / "site.toml").write_text(text)
    assert load_site(tmp_path / "site.toml").data.columns == {"text": "message"}


def test_the_federation_is_one_that_can_be_founded(tmp_path: Path) -> None:
    (tmp_path / "federation.toml").write_text(tables("coordinator.md")[0])
    assert load_federation_spec(tmp_path / "federation.toml").federation.name == "intents"


def test_the_policy_of_a_kit_is_the_one_of_the_guide() -> None:
    """But for the backbone, which only a site can name, and for the hours."""
    kit, guide = tomllib.loads(POLICY), tomllib.loads(tables("privacy-officer.md")[0])
    del guide["model"]["allowed_backbones"], guide["limits"]["hours"]
    assert kit == guide


def test_every_reason_of_the_policy_is_explained() -> None:
    codes = re.findall(r'\("([a-z-]+)", ', inspect.getsource(_rules))
    explained = set(re.findall(r"`policy-([a-z-]+)`", read("privacy-officer.md")))
    assert codes
    assert explained == set(codes)
