"""The compose files: read as meant, nothing writable but volumes and /tmp, paths that exist."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.programs import find, passes

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/compose"
OVERLAYS = ("gpu.yaml", "observability.yaml")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A person's own FEDGRAFT_... decide what compose.yaml mounts."""
    for name in os.environ:
        if name.startswith("FEDGRAFT_"):
            monkeypatch.delenv(name)


def merged(*files: str, stub: Path) -> dict[str, Any]:
    """What podman-compose makes of the files; ``stub`` answers when it asks podman its version."""
    compose = find("podman-compose", source="the extra `dev`")
    podman = stub / "podman"
    podman.write_text("#!/bin/sh\necho podman version 5.4.2\n")
    podman.chmod(0o755)
    named = [part for name in files for part in ("--file", name)]
    text = passes([compose, "--podman-path", podman, *named, "config"], cwd=FOLDER)
    read: dict[str, Any] = yaml.safe_load(text)
    return read


@pytest.mark.parametrize("overlay", [None, *OVERLAYS])
def test_every_service_is_locked_down(overlay: str | None, tmp_path: Path) -> None:
    read = merged("compose.yaml", *([overlay] if overlay else []), stub=tmp_path)
    assert {"coordinator", "site"} <= set(read["services"])
    for service in read["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["restart"] == "always"
        assert not service.get("privileged")


def test_the_site_opens_no_port_and_the_coordinator_one(tmp_path: Path) -> None:
    services = merged("compose.yaml", stub=tmp_path)["services"]
    assert "ports" not in services["site"]
    assert services["coordinator"]["ports"] == ["8443:8443"]


def test_what_a_site_mounts_of_its_host_is_read_only(tmp_path: Path) -> None:
    volumes = merged("compose.yaml", stub=tmp_path)["services"]["site"]["volumes"]
    assert [volume for volume in volumes if volume.startswith(("/", "."))] == [
        "./site:/etc/fedgraft:ro",
        "./data:/data:ro",
    ]


def test_images_are_built_from_files_that_are_there(tmp_path: Path) -> None:
    for service in merged("compose.yaml", stub=tmp_path)["services"].values():
        context = (FOLDER / service["build"]["context"]).resolve()
        assert context == ROOT
        assert (context / service["build"]["dockerfile"]).is_file()


def test_prometheus_shares_the_coordinators_loopback(tmp_path: Path) -> None:
    services = merged("compose.yaml", "observability.yaml", stub=tmp_path)["services"]
    assert services["prometheus"]["network_mode"] == "service:coordinator"
    assert [port for port in services["coordinator"]["ports"] if port.endswith(":9090")] == [
        "127.0.0.1:9090:9090"
    ]
