"""The images: sound Dockerfiles, and for a site a wheel without a line of server code."""

import re
import shutil
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.programs import find, passes

from fedgraft.common.cli import VERBS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/docker"
IMAGES = ("site", "coordinator")
ROOMS = {"client", "server", "simulations"}
each_image = pytest.mark.parametrize("image", IMAGES)


def stages(image: str) -> list[list[str]]:
    """The Dockerfile's stages, each as its instructions on one line."""
    text = (FOLDER / f"Dockerfile.{image}").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    starts = [at for at, line in enumerate(joined) if line.startswith("FROM ")]
    return [joined[a:b] for a, b in zip(starts, [*starts[1:], len(joined)], strict=True)]


def copies(stage: list[str]) -> list[str]:
    """What a stage copies from the build context."""
    copied = [line.split()[1:-1] for line in stage if line.startswith("COPY ")]
    return [name for names in copied if not names[0].startswith("--from") for name in names]


@each_image
def test_hadolint_has_nothing_to_say(image: str) -> None:
    hadolint = find("hadolint", source="the extra `dev`")
    passes([hadolint, FOLDER / f"Dockerfile.{image}"])


@each_image
def test_the_image_is_not_root_and_can_be_pinned(image: str) -> None:
    all_stages, last = stages(image), stages(image)[-1]
    assert all(stage[0].split()[1] == "${BASE}" for stage in all_stages)
    assert "USER 10001:10001" in last
    assert last.index("USER 10001:10001") > max(
        at for at, line in enumerate(last) if line.startswith(("RUN", "COPY"))
    )
    assert any(line.startswith("HEALTHCHECK ") for line in last)
    assert copies(last) == []  # no source, only what was installed


@each_image
def test_only_what_is_copied_enters_the_build(image: str) -> None:
    ignore = (FOLDER / f"Dockerfile.{image}.dockerignore").read_text(encoding="utf-8").split("\n")
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore
    assert allowed == {name for stage in stages(image) for name in copies(stage)}


def wheel_of(image: str, folder: Path) -> Path:
    """The wheel that an image installs, built from what its first stage copies."""
    if find_spec("hatchling") is None:
        pytest.skip("hatchling is not here: it comes with the extra `dev`")
    context = folder / "build"
    context.mkdir()
    for name in copies(stages(image)[0]):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, context / name)
    flags = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", folder)
    passes([sys.executable, "-m", "pip", "wheel", *flags, context])
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.parametrize(
    ("image", "left_out"),
    [("site", {"server", "simulations"}), ("coordinator", {"client", "simulations"})],
)
def test_the_wheel_holds_one_side_only(image: str, left_out: set[str], tmp_path: Path) -> None:
    names = zipfile.ZipFile(wheel_of(image, tmp_path)).namelist()
    rooms = {found[1] for name in names if (found := re.match(r"fedgraft/(\w+)/", name))}
    assert rooms == {"common"} | ROOMS - left_out
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]


def test_a_sites_image_offers_the_verbs_of_a_site_only(tmp_path: Path) -> None:
    zipfile.ZipFile(wheel_of("site", tmp_path)).extractall(tmp_path / "installed")
    rooms = [str(ROOT / room) for room in ("common", "client", "server", "simulations")]
    script = (
        f"import sys; sys.path = [{str(tmp_path / 'installed')!r}]"
        f" + [path for path in sys.path if path not in {rooms!r}];"
        " sys.argv = ['fedgraft', '--help']; from fedgraft.common.cli import main; main()"
    )
    said = passes([sys.executable, "-c", script], cwd=tmp_path)
    offered = set(re.findall(r"^  ([a-z]+)  ", said.partition("Commands:")[2], re.MULTILINE))
    assert "site" in offered
    theirs = ("fedgraft.client.", "fedgraft.common.")
    wanted = {
        verb.split()[0]
        for verb, (*places, _) in VERBS.items()
        if any(place.startswith(theirs) for place in places)
    }
    assert offered == wanted
