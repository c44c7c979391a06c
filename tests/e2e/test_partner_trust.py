"""A site whose CA, certificate or clock is wrong: its log says what, its doctor how to mend it."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from e2e.partners import NGINX, Partners
from support.federations import digits_job, write_digits

from fedgraft.common.federation.certificates import issue_site, load_key, make_ca, make_key

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed"),
]

SITE = "site-00"
WEEK = timedelta(days=7)


@pytest.fixture(scope="module")
def partners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Partners]:
    folder = tmp_path_factory.mktemp("p")  # short: it holds sockets
    job = digits_job(*write_digits(folder / "digits", 60, 30))
    with Partners(folder, job) as running:
        running.join(SITE)
        running.start_sites([SITE])  # all is well
        running.end(SITE)
        yield running


@pytest.fixture
def state(partners: Partners) -> Iterator[Path]:
    """The site's state, which is put right again after the test."""
    state = partners.folder / SITE / "state"
    files = {state / name: (state / name).read_bytes() for name in ("ca.pem", "certificate.pem")}
    yield state
    partners.end(SITE)
    for path, content in files.items():
        path.write_bytes(content)


def doctor(partners: Partners) -> dict[str, tuple[str, str, str]]:
    """The state of each finding, what was seen, and the hint."""
    config = str(partners.folder / SITE / "site.toml")
    done = partners.call("site", "doctor", "--site", config, "--json", check=False)
    assert done.returncode == 1
    return {
        one["name"]: (one["state"], one["what"], one["hint"])
        for one in json.loads(done.stdout)["findings"]
    }


def test_a_wrong_ca_is_named(partners: Partners, state: Path) -> None:
    (state / "ca.pem").write_bytes(make_ca("trial", make_key(), datetime.now(UTC)))
    partners.launch_site(SITE)
    partners.until(lambda: "(tls): run `fedgraft site doctor`" in partners.read(f"{SITE}.log"))
    verdict, what, hint = doctor(partners)["tls"]
    assert verdict == "fail" and what.startswith("wrong CA") and "proxy" in hint


def test_an_expired_certificate_is_named_with_what_mends_it(
    partners: Partners, state: Path
) -> None:
    ca_key = load_key((partners.home / "ca.key").read_bytes())
    public = load_key((state / "tls.key").read_bytes()).public_key()
    ca = (state / "ca.pem").read_bytes()
    then = datetime.now(UTC) - 2 * WEEK
    old = issue_site(ca, ca_key, public, site=SITE, now=then, lifetime=WEEK)
    (state / "certificate.pem").write_bytes(old)
    partners.launch_site(SITE)
    partners.until(lambda: "expired or revoked" in partners.read(f"{SITE}.log"))
    verdict, what, hint = doctor(partners)["certificate"]
    assert verdict == "fail" and what.startswith("expired on")
    assert f"fedgraft provision renew {SITE}" in hint and "fedgraft site join" in hint


def test_a_clock_that_is_ahead_is_not_taken_in_silence(partners: Partners, state: Path) -> None:
    """Signatures of requests hold the time; the doctor's own tests have its word on clocks."""
    assert state.exists()
    partners.launch_site(SITE, "ahead")
    partners.until(lambda: "this clock is wrong" in partners.read(f"{SITE}.log"))
    assert "fedgraft site doctor" in partners.read(f"{SITE}.log")
    assert "joined as" not in partners.read(f"{SITE}.log")
