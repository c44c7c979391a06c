"""What was made from the .proto is what protoc makes of it now."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RPC = Path("fedgraft/common/rpc")


@pytest.mark.parametrize("name", ["fedgraft_v1_pb2.py", "fedgraft_v1_pb2.pyi"])
def test_the_code_is_made_from_the_description(name: str, tmp_path: Path) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", "-I", ROOT / "common"),
            *(f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"),
            ROOT / "common" / RPC / "fedgraft_v1.proto",
        ],
        check=True,
    )
    assert (tmp_path / RPC / name).read_text() == (ROOT / "common" / RPC / name).read_text()
