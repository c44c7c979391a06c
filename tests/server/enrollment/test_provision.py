"""Founding a federation, adding to it, renewing and revoking; nothing half-made, nothing lost."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from support.commands import command
from support.memberships import NAMES, write_plan

from fedgraft.client.policy.policy_file import load_policy
from fedgraft.common.errors import InputError
from fedgraft.common.federation.certificates import load_key, public_pem, revoked
from fedgraft.common.federation.kit import open_kit
from fedgraft.server.enrollment.provision import (
    Founded,
    found,
    load_federation_spec,
    renew_kit,
    revoke,
)
from fedgraft.server.enrollment.registry import Certificate, Registry, Site, hash_token


@pytest.fixture
def made(tmp_path: Path) -> Founded:
    return found(write_plan(tmp_path), tmp_path / "home", tmp_path / "kits")


def token_of(kit: Path) -> str:
    return str(json.loads(kit.read_text())["kit"]["token"])


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def joined(home: Path, name: str, *serials: int) -> None:
    """Have a site joined in the registry, without a request."""
    until = (datetime.now(UTC) + timedelta(days=7)).isoformat()
    with Registry(home).change() as sites:
        number = list(sites).index(name) + 1
        sites[name] = replace(
            sites[name],
            state="joined",
            identity=f"{number:02x}" * 32,
            certificates=tuple(Certificate(one, until) for one in serials),
        )


def test_a_folder_a_kit_each_and_modes(made: Founded, tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert [path.name for path in made.kits] == [f"{name}.kit" for name in NAMES]
    for path in (home, tmp_path / "kits"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in (home / "ca.key", home / "server.key", home / "secret", *made.kits):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert revoked((home / "crl.pem").read_bytes()) == set()
    assert not (home / "roster.toml").exists()


def test_keys_are_private_from_their_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    real = os.open

    def watched(path: object, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            modes.append(mode)
        return real(path, flags, mode)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", watched)
    before = os.umask(0)
    try:
        found(write_plan(tmp_path), tmp_path / "home", tmp_path / "kits")
    finally:
        os.umask(before)
    assert modes.count(0o600) == 3 + len(NAMES)
    assert set(modes) == {0o600}


def test_no_private_key_and_no_token_where_none_belongs(made: Founded, tmp_path: Path) -> None:
    secrets = [(tmp_path / "home" / name).read_bytes() for name in ("ca.key", "server.key")]
    numbers = [load_key(pem).private_numbers().private_value for pem in secrets]
    for path in made.kits:
        text = path.read_text()
        whole = json.loads(text)
        assert "PRIVATE" not in text
        for pem in re.findall(r"-----BEGIN ([A-Z ]+)-----", json.dumps(whole)):
            assert pem == "CERTIFICATE"
        for value in json.dumps(whole).split('"'):
            with pytest.raises((ValueError, TypeError)):
                serialization.load_pem_private_key(value.encode(), password=None)
        assert not any(f"{number:064x}" in text for number in numbers)
        assert token_of(path) not in (tmp_path / "home" / "sites.json").read_text()
    assert len({token_of(path) for path in made.kits}) == len(NAMES)


def test_the_kit_opens_and_its_policy_is_one(made: Founded, tmp_path: Path) -> None:
    kit = open_kit(made.kits[0], made.fingerprint, datetime.now(UTC))
    assert (kit.federation, kit.site, kit.sites) == ("trial", NAMES[0], NAMES)
    assert kit.expires - kit.issued == timedelta(days=14)
    (tmp_path / "policy.toml").write_text(kit.policy)
    assert load_policy(tmp_path / "policy.toml").model.allowed_backbones == {}


def test_adding_a_site_leaves_the_ca_and_other_kits_alone(made: Founded, tmp_path: Path) -> None:
    home, kits = tmp_path / "home", tmp_path / "kits"
    before, old = content(home), content(kits)
    again = found(write_plan(tmp_path, [*NAMES, "hospital-d"]), home, kits)
    assert [path.name for path in again.kits] == ["hospital-d.kit"]
    assert again.fingerprint == made.fingerprint
    for name in ("ca.key", "ca.pem", "secret", "server.key"):
        assert content(home)[name] == before[name]
    assert {name: content(kits)[name] for name in old} == old
    kit = open_kit(again.kits[0], made.fingerprint, datetime.now(UTC))
    assert kit.sites == (*NAMES, "hospital-d")
    assert found(write_plan(tmp_path, NAMES[:2]), home, kits).left == (NAMES[2], "hospital-d")


def test_a_new_name_is_not_one_that_is_there_in_another_case(made: Founded, tmp_path: Path) -> None:
    before = content(tmp_path / "home")
    plan = write_plan(tmp_path, ["Hospital-A"])  # and hospital-a has a kit, and maybe a member
    with pytest.raises(InputError, match="twice"):
        found(plan, tmp_path / "home", tmp_path / "kits")
    assert content(tmp_path / "home") == before
    assert sorted(path.name for path in (tmp_path / "kits").iterdir()) == [
        f"{name}.kit" for name in NAMES
    ]


def test_the_endpoint_may_change_and_what_sites_were_promised_may_not(
    made: Founded, tmp_path: Path
) -> None:
    home, kits = tmp_path / "home", tmp_path / "kits"
    plan = write_plan(tmp_path, endpoint="10.0.0.9:8443")
    found(plan, home, kits)
    certificate = serialization_public(home / "server.pem")
    assert certificate == public_pem(load_key((home / "server.key").read_bytes()))
    before = content(home)
    for changed in (
        plan.read_text().replace('"trial"', '"other"'),
        plan.read_text() + "\n[secure_aggregation]\ncolluders = 2\nmin_cohort = 4\n",
    ):
        plan.write_text(changed)
        with pytest.raises(InputError, match="not what the sites' kits say"):
            found(plan, home, kits)
        assert content(home) == before


def serialization_public(path: Path) -> bytes:
    from cryptography import x509

    key = x509.load_pem_x509_certificate(path.read_bytes()).public_key()
    return public_pem(key)  # type: ignore[arg-type]


def test_a_renewed_kit_makes_the_old_one_void(made: Founded, tmp_path: Path) -> None:
    home = tmp_path / "home"
    old, others = token_of(made.kits[0]), content(tmp_path / "kits")
    joined(home, NAMES[0], 11)
    path = renew_kit(home, NAMES[0], tmp_path / "kits")
    site = Registry(home).sites()[NAMES[0]]
    assert site.token == hash_token(token_of(path)) != hash_token(old)
    assert (site.state, site.certificates) == ("invited", ())
    assert revoked((home / "crl.pem").read_bytes()) == {11}
    changed = {n for n, raw in content(tmp_path / "kits").items() if raw != others[n]}
    assert changed == {path.name}


def test_revoking_names_every_certificate_and_leaves_the_roster(
    made: Founded, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    joined(home, NAMES[0], *range(100, 140))
    joined(home, NAMES[1], 7)
    revoke(home, NAMES[0])
    assert revoked((home / "crl.pem").read_bytes()) == set(range(100, 140))
    assert NAMES[0] not in (home / "roster.toml").read_text()
    assert NAMES[1] in (home / "roster.toml").read_text()
    assert list(Registry(home).members()) == [NAMES[1]]
    revoke(home, NAMES[0])  # again does no harm
    assert revoked((home / "crl.pem").read_bytes()) == set(range(100, 140))


def test_a_list_is_signed_again_only_when_it_changes(made: Founded, tmp_path: Path) -> None:
    home = tmp_path / "home"
    before = (home / "crl.pem").read_bytes()
    joined(home, NAMES[0], 11)
    assert (home / "crl.pem").read_bytes() == before


def test_certificates_that_have_ended_are_listed_no_more() -> None:
    now = datetime.now(UTC)
    ended = Certificate(1, (now - timedelta(seconds=1)).isoformat())
    lives = Certificate(2, (now + timedelta(days=1)).isoformat())
    site = Site(certificates=(ended, lives), dead=(lives, ended)).without_ended(now)
    assert (site.certificates, site.dead) == ((lives,), (lives,))


def test_changes_of_many_threads_and_processes_are_all_kept(made: Founded, tmp_path: Path) -> None:
    home = tmp_path / "home"
    code = (
        "import sys; from dataclasses import replace; from pathlib import Path\n"
        "from fedgraft.server.enrollment.registry import Registry\n"
        "for _ in range(15):\n"
        "    with Registry(Path(sys.argv[1])).change() as sites:\n"
        "        site = sites['hospital-a']\n"
        "        sites['hospital-a'] = replace(site, audit_lines=site.audit_lines + 1)\n"
    )
    others = [subprocess.Popen([sys.executable, "-c", code, str(home)]) for _ in range(2)]

    def count(_: int) -> None:
        with Registry(home).change() as sites:
            site = sites["hospital-a"]
            sites["hospital-a"] = replace(site, audit_lines=site.audit_lines + 1)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(count, range(40)))
    assert [other.wait(60) for other in others] == [0, 0]
    assert Registry(home).sites()["hospital-a"].audit_lines == 70


def test_a_change_that_fails_changes_nothing(made: Founded, tmp_path: Path) -> None:
    before = content(tmp_path / "home")
    with pytest.raises(ZeroDivisionError), Registry(tmp_path / "home").change() as sites:
        sites.clear()
        _ = 1 / 0
    assert content(tmp_path / "home") == before


def test_killed_at_any_moment_founding_goes_on(tmp_path: Path) -> None:
    """Killed after a while that grows: the next try ends well, and with one CA."""
    plan = write_plan(tmp_path)
    where = [str(plan), str(tmp_path / "home"), str(tmp_path / "kits")]
    code = (
        "import sys; from pathlib import Path\n"
        "from fedgraft.server.enrollment.provision import found\n"
        "print('begin', flush=True); found(*map(Path, sys.argv[1:]))"
    )
    fingerprints = set()
    for step in range(0, 8, 2):
        process = subprocess.Popen([sys.executable, "-c", code, *where], stdout=subprocess.PIPE)
        assert process.stdout
        process.stdout.readline()
        time.sleep(step * 0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if (tmp_path / "home" / "ca.pem").exists():
            fingerprints.add((tmp_path / "home" / "ca.pem").read_bytes())
    made = found(plan, tmp_path / "home", tmp_path / "kits")
    fingerprints.add((tmp_path / "home" / "ca.pem").read_bytes())
    assert len(fingerprints) == 1
    sites = Registry(tmp_path / "home").sites()
    for name in NAMES:
        path = tmp_path / "kits" / f"{name}.kit"
        assert open_kit(path, made.fingerprint, datetime.now(UTC)).site == name
        assert sites[name].token == hash_token(token_of(path))


def test_a_lost_registry_is_not_made_anew(made: Founded, tmp_path: Path) -> None:
    """It would let revoked sites in again."""
    (tmp_path / "home" / "sites.json").unlink()
    with pytest.raises(InputError, match=r"sites\.json is missing"):
        found(tmp_path / "federation.toml", tmp_path / "home", tmp_path / "kits")
    (tmp_path / "home" / "sites.json").write_text('{"sites": {"a": 7}}')
    with pytest.raises(InputError, match="damaged"):
        Registry(tmp_path / "home").sites()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "federation"),
        ("[federation", "not valid TOML"),
        ('[federation]\nname = "t"\nendpoint = "h:1"\nsites = []', "sites"),
        ('[federation]\nname = "t"\nendpoint = "h"\nsites = ["a"]', "endpoint"),
        ('[federation]\nname = "t"\nendpoint = "h:99999"\nsites = ["a"]', "port"),
        ('[federation]\nname = "t"\nendpoint = "h:1"\nsites = ["a", "a"]', "twice"),
        ('[federation]\nname = "t"\nendpoint = "h:1"\nsites = ["Ab", "aB"]', "twice"),
        ('[federation]\nname = "t"\nendpoint = "h:1"\nsites = ["../a"]', "sites"),
        ('[federation]\nname = "t"\nendpoint = "h:1"\nsites = ["a"]\nkit_lifetime = "x"', "kit_"),
        ('[federation]\nname = "t"\nendpoint = "h:1"\nsites = ["a"]\nsite = 1', "site"),
    ],
)
def test_a_file_that_is_wrong_is_explained_and_nothing_made(
    tmp_path: Path, text: str, what: str
) -> None:
    (tmp_path / "federation.toml").write_text(text)
    with pytest.raises(InputError, match=what) as error:
        load_federation_spec(tmp_path / "federation.toml")
    assert error.value.hint
    with pytest.raises(InputError):
        found(tmp_path / "federation.toml", tmp_path / "home", tmp_path / "kits")
    assert not (tmp_path / "home").exists()


# --- as people type it


def test_the_verbs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_plan(tmp_path)
    code, out, _ = command(capsys, "provision", "federation.toml", "-o", "kits/")
    assert code == 0
    assert re.search(r"fingerprint: [0-9a-f]{64}\n", out)
    for words in (("-o", "kits/", "federation.toml"), ("kits", "federation.toml")):
        code, out, _ = command(capsys, "provision", *words)
        assert (code, "No new site" in out) == (0, True)
    code, out, _ = command(capsys, "provision", "federation.toml", "--json")
    assert json.loads(out)["kits"] == []
    assert command(capsys, "provision", "renew", "hospital-b")[0] == 0
    assert command(capsys, "provision", "revoke", "hospital-b")[0] == 0
    code, out, _ = command(capsys, "provision", "list", "--json")
    states = {line["site"]: line["state"] for line in json.loads(out)["sites"]}
    assert states["hospital-b"] == "revoked"
    assert "hospital-b" in command(capsys, "provision", "list")[1]


@pytest.mark.parametrize(
    "words",
    [
        ("provision", "nothing.toml"),
        ("provision", "list"),
        ("provision", "revoke", "hospital-a"),
        ("provision", "renew", "hospital-a"),
        ("provision", "revoke"),
        ("provision",),
    ],
    ids=" ".join,
)
def test_wrong_use_is_said_without_a_traceback(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command(capsys, *words)
    assert code == 2
    assert "Traceback" not in out + err
    assert not list(tmp_path.iterdir())


def test_an_unknown_site(made: Founded, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("renew", "revoke"):
        code, _, err = command(capsys, "provision", verb, "x", "--home", str(tmp_path / "home"))
        assert (code, "no site x" in err) == (2, True)


@pytest.mark.parametrize("words", [("provision",), ("site",), ("coordinator",), ()], ids=str)
def test_help_loads_nothing_heavy(words: tuple[str, ...]) -> None:
    code = (
        "import sys; from fedgraft.common import cli\n"
        "sys.argv = ['fedgraft', *sys.argv[1:], '--help']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'grpc', 'flwr', 'cryptography', 'pydantic'} & {*sys.modules}\n"
        "print(*heavy, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    assert not done.stderr.split()
    assert "Commands:" in done.stdout
    if words == ("provision",):
        assert all(verb in done.stdout for verb in ("kits", "renew", "revoke", "list"))
