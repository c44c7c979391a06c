"""The doctor on what computes: GPUs that are not there, full, or without a driver."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.clinic import CANARY, Site, look

from fedgraft.client.doctor import device as doctor_device
from fedgraft.client.doctor.checklist import CHECKS, examine


def test_a_gpu_that_is_not_there(site: Site) -> None:
    site.file.write_text(site.file.read_text().replace('"cpu"', '"mps"'))
    found = look(site, CHECKS)
    assert found["device"].what == "device mps is not available here"
    assert found["training"].what == "needs device"


def test_a_gpu_and_what_it_can_do(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.file.write_text(site.file.read_text().replace('"cpu"', '"auto"'))
    facts = SimpleNamespace(name="Fake T4", total_memory=16e9)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: facts)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (4e9, 16e9))
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    monkeypatch.setattr(doctor_device, "DRIVER", site.folder / "none")

    def full(chosen: object) -> tuple[bool, int]:
        raise torch.OutOfMemoryError(CANARY)

    monkeypatch.setattr(doctor_device, "_train", full)
    found = look(site, CHECKS)
    said = "Fake T4, 4.0 of 16.0 GB free, driver unknown, no bf16, torch "
    assert found["device"].what.startswith(said)
    assert found["training"].what == "cuda has no memory left"


def test_a_driver_that_torch_cannot_use(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.file.write_text(site.file.read_text().replace('"cpu"', '"auto"'))
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n")
    monkeypatch.setattr(doctor_device, "DRIVER", version)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = {one.name: one for one in examine(site.file, CHECKS)}
    assert found["device"].state == "warn"
    assert "NVIDIA driver 535.104.05 is here" in found["device"].what
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Rel\n")
    assert doctor_device._driver() == "550.54.15"
