"""The doctor as a whole: all well, nothing changed, nothing of the data said; the command."""

import json
import sys
from pathlib import Path

import pytest
from support.clinic import CANARY, QUICK, Coordinator, Site, look, states

from fedgraft.client.doctor.checklist import CHECKS, Check, Finding, examine
from fedgraft.common.cli import main


def test_all_is_well(site: Site, coordinator: Coordinator) -> None:
    found = look(site, CHECKS)
    assert states(found) == {}
    assert list(found) == [check.name for check in CHECKS]
    assert set(coordinator.site_names) == {"a"}
    assert "3 steps of a LoRA adapter on cpu" in found["training"].what
    assert found["data"].what == "train 2 rows (text, label); test 1 rows (text, label)"
    assert "2 of 3 sites have joined" in found["roster"].what
    assert "Methods allowed: lora" in found["rules"].what


def test_nothing_is_changed(site: Site) -> None:
    def everything() -> dict[Path, tuple[int, int, bytes]]:
        found = {path: path.stat() for path in [site.folder, *site.folder.rglob("*")]}
        return {
            path: (facts.st_mode, facts.st_mtime_ns, path.read_bytes() if path.is_file() else b"")
            for path, facts in found.items()
        }

    before = everything()
    look(site, CHECKS)
    assert everything() == before


def test_a_check_that_breaks_stops_no_other_and_keeps_its_words_to_itself(site: Site) -> None:
    def breaks(patient: object) -> Finding:
        raise RuntimeError(CANARY)

    found = look(site, (Check("breaks", breaks), Check("after", breaks, ("breaks",)), *QUICK))
    assert found["breaks"].what == "could not be checked (RuntimeError)"
    assert states(found) == {"breaks": "fail", "after": "skipped"}


def test_without_a_site_file_only_proxies_are_looked_at(tmp_path: Path) -> None:
    found = list(examine(tmp_path / "site.toml"))
    assert found[0].state == "fail"
    assert {one.name for one in found if one.state == "ok"} == {"proxies"}
    assert all(one.state == "skipped" for one in found[1:] if one.name != "proxies")


def run(site: Site, *more: str) -> int:
    """The exit code of the real command."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        words = ["fedgraft", "site", "doctor", "--site", str(site.file), *more]
        patch.setattr(sys, "argv", words)
        main()
    assert isinstance(left.value.code, int)
    return left.value.code


def test_the_command_says_a_line_a_check_and_then_hints(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(site) == 0
    (site.state / "tls.key").chmod(0o644)
    capsys.readouterr()
    assert run(site) == 1
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [line.split()[1] for line in lines[: len(CHECKS)]] == [one.name for one in CHECKS]
    assert f"  keys: chmod 600 {site.state / 'tls.key'}" in lines
    assert CANARY not in said.out + said.err
    assert "PRIVATE" not in said.out + said.err


def test_json_is_one_object_and_warnings_do_not_fail(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.certify(days=0.5)
    assert run(site, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["healthy"] is True
    assert {one["name"]: one["state"] for one in said["findings"]}["certificate"] == "warn"
    (site.folder / "train.csv").unlink()
    assert run(site, "--json") == 1
    said = json.loads(capsys.readouterr().out)
    assert said["healthy"] is False
    assert CANARY not in json.dumps(said)
