"""The doctor on what lies here: files, keys, certificate, roster, audit, each wrong on purpose."""

from pathlib import Path

import pytest
from support.clinic import Authority, Site, look, states

from fedgraft import common
from fedgraft.client.doctor.local import Finding, _largest_backbone
from fedgraft.common.backbones.manifest import make_manifest
from fedgraft.common.federation.audit_log import Audit

BUILTIN = Path(common.__file__).parent / "builtin" / "glyph-vit"


def test_a_broken_policy_is_named_and_the_rest_goes_on(site: Site) -> None:
    (site.folder / "policy.toml").write_text("[model]\nmax_rnk = 3\n")
    found = look(site)
    assert states(found) == {"policy": "fail", "rate": "skipped", "rules": "skipped"}
    assert "did you mean max_rank?" in found["policy"].hint


def test_a_site_that_has_not_joined_still_sees_what_is_here(site: Site) -> None:
    (site.state / "membership.json").unlink()
    found = look(site)
    assert found["membership"].state == "fail"
    assert found["tls"] == Finding("tls", "skipped", "needs tcp")
    assert found["data"].state == "ok"


def test_the_kits_name_and_the_sites_have_to_agree(site: Site) -> None:
    site.file.write_text(site.file.read_text().replace('name = "a"', 'name = "z"'))
    found = look(site)
    assert found["membership"].what == "site.toml says z, the kit was for a"
    assert found["membership"].hint == 'name = "a" in site.toml'


@pytest.mark.parametrize(
    ("days", "state", "what"),
    [(-1, "fail", "expired on"), (0.5, "warn", "expires in 12.0 hours"), (9, "fail", "valid from")],
)
def test_a_certificate_outside_its_time(site: Site, days: float, state: str, what: str) -> None:
    site.certify(days=days)
    found = look(site)
    assert found["certificate"].state == state
    assert what in found["certificate"].what
    if days < 1:
        assert "fedgraft provision renew a" in found["certificate"].hint
    if state == "fail":
        assert found["coordinator"].what == "needs certificate"


def test_a_certificate_of_somebody_else(site: Site) -> None:
    site.certify(name="b")
    assert look(site)["certificate"].what == "it is for b"
    other = Authority()
    site.authority = other
    site.certify()
    assert "not signed" in look(site)["certificate"].what


@pytest.mark.parametrize("name", ["identity.pem", "tls.key"])
def test_a_key_that_others_can_read(site: Site, name: str) -> None:
    (site.state / name).chmod(0o640)
    found = look(site)
    assert found["keys"].state == "fail"
    assert found["keys"].hint == f"chmod 600 {site.state / name}"
    assert "(0640)" in found["keys"].what
    (site.state / name).unlink()
    assert "is missing" in look(site)["keys"].what


@pytest.mark.parametrize(("mode", "state"), [(0o755, "warn"), (0o770, "fail"), (0o777, "fail")])
def test_a_state_folder_that_is_open(site: Site, mode: int, state: str) -> None:
    site.state.chmod(mode)
    found = look(site)
    assert states(found) == {"keys": state}
    assert found["keys"].hint == f"chmod 700 {site.state}"


def test_a_full_disk(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 400_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    found = look(site)
    assert states(found) == {"disk": "fail"}
    assert found["disk"].what == "0.4 GB free; a backbone needs 1.0 GB"
    monkeypatch.setattr("fedgraft.client.doctor.local._largest_backbone", lambda state: 3 * 10**8)
    assert look(site)["disk"].state == "ok"  # once more what is here already
    monkeypatch.setattr("fedgraft.client.doctor.local._largest_backbone", lambda state: 5 * 10**8)
    assert "another backbone of this size needs 0.5 GB" in look(site)["disk"].what


def test_the_largest_backbone_that_is_here(site: Site) -> None:
    manifest = make_manifest(BUILTIN, source="builtin")
    place = site.state / "backbones" / "manifests"
    place.mkdir(parents=True)
    (place / f"{manifest.digest}.json").write_bytes(manifest.to_json())
    assert _largest_backbone(site.state) == manifest.size > 0
    assert look(site)["disk"].state == "ok"


def test_a_roster_with_another_key_for_us(site: Site) -> None:
    text = (site.state / "roster.toml").read_text()
    own = text.split('a = "')[1][:64]
    (site.state / "roster.toml").write_text(text.replace(own, "cd" * 32))
    assert states(look(site)) == {"roster": "fail"}


def test_an_audit_that_was_changed(site: Site) -> None:
    path = site.state / "audit.jsonl"
    audit = Audit(path)
    audit.append({"direction": "in"})
    audit.append({"direction": "out"})
    assert look(site)["audit"].what.startswith("2 lines")
    path.write_bytes(path.read_bytes().replace(b'"in"', b'"no"'))
    assert states(look(site)) == {"audit": "fail"}
