"""The units: understood by systemd, hardened, and running the verbs that exist."""

import re
import shutil
from pathlib import Path

import pytest
from support.programs import find, passes, run

FOLDER = Path(__file__).parents[2] / "deploy/systemd"
UNITS = ("fedgraft-coordinator.service", "fedgraft-site.service")
MOST_EXPOSED = 2.0
each_unit = pytest.mark.parametrize("unit", UNITS)


def values(unit: str, key: str) -> list[str]:
    """All values that a unit gives a key, in order."""
    return re.findall(rf"^{key}=(.*)$", (FOLDER / unit).read_text(encoding="utf-8"), re.MULTILINE)


def copied(unit: str, folder: Path, *, drop_in: bool = False) -> Path:
    """The unit in ``folder``, its program replaced by one that is there."""
    text = (FOLDER / unit).read_text(encoding="utf-8")
    (folder / unit).write_text(text.replace("/opt/fedgraft/bin/fedgraft", "/bin/true"))
    if drop_in:
        shutil.copytree(FOLDER / f"{unit}.d", folder / f"{unit}.d")
    return folder / unit


@pytest.mark.parametrize(("unit", "drop_in"), [*((u, False) for u in UNITS), (UNITS[1], True)])
def test_systemd_understands_the_unit(unit: str, drop_in: bool, tmp_path: Path) -> None:
    analyze = find("systemd-analyze", source="systemd")
    said = passes([analyze, "verify", copied(unit, tmp_path, drop_in=drop_in)])
    assert unit not in said, said  # it warns of an unknown key and still succeeds


@pytest.mark.parametrize(("unit", "drop_in"), [*((u, False) for u in UNITS), (UNITS[1], True)])
def test_the_unit_is_hardened(unit: str, drop_in: bool, tmp_path: Path) -> None:
    analyze = find("systemd-analyze", source="systemd")
    path = copied(unit, tmp_path, drop_in=drop_in)
    done = run([analyze, "security", "--offline=true", "--no-pager", path])
    level = re.search(rf"level for {re.escape(unit)}: ([0-9.]+)", done.stdout)
    assert level is not None, done.stdout + done.stderr
    assert float(level[1]) <= MOST_EXPOSED


@each_unit
def test_the_unit_always_comes_back_and_waits_for_the_clock(unit: str) -> None:
    assert values(unit, "Restart") == ["always"]
    assert values(unit, "StartLimitIntervalSec") == ["0"]
    assert {"time-sync.target", "network-online.target"} <= set(values(unit, "After")[0].split())


def test_a_site_comes_back_when_the_coordinator_takes_it_again() -> None:
    assert values("fedgraft-site.service", "RestartSec") == ["65"]


def test_the_account_of_the_units_is_one_that_sysusers_makes(tmp_path: Path) -> None:
    sysusers = find("systemd-sysusers", source="systemd")
    account = FOLDER / "fedgraft.sysusers.conf"
    (tmp_path / "etc").mkdir()
    passes([sysusers, f"--root={tmp_path}", account])
    made = (tmp_path / "etc/passwd").read_text(encoding="utf-8")
    for unit in UNITS:
        assert f"{values(unit, 'User')[0]}:x:" in made
