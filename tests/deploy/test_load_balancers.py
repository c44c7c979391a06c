"""What may stand before the coordinator: right by its own program, and never an end of TLS."""

from pathlib import Path

import pytest
from support.programs import find, passes

FOLDER = Path(__file__).parents[2] / "deploy/nginx"
STREAM = Path("/usr/lib/nginx/modules/ngx_stream_module.so")


def test_nginx_takes_the_passthrough(tmp_path: Path) -> None:
    nginx = find("nginx", source="Debian's package nginx-light")
    if not STREAM.exists():
        pytest.skip("nginx cannot pass TCP here: that comes with libnginx-mod-stream")
    directives = f"pid {tmp_path}/pid; error_log stderr;"
    passes([nginx, "-t", "-q", "-c", FOLDER / "passthrough.conf", "-g", directives])


def test_haproxy_takes_the_passthrough() -> None:
    haproxy = find("haproxy", source="Debian's package haproxy")
    passes([haproxy, "-c", "-f", FOLDER / "haproxy.cfg"])


@pytest.mark.parametrize("name", ["passthrough.conf", "haproxy.cfg"])
def test_neither_ends_tls(name: str) -> None:
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    assert not {"ssl", "tls", "crt", "certificate", "http"} & set(text.lower().split())
    assert "8443" in text
