"""The command as a user calls it, in this process."""

import sys

import pytest

from fedgraft.common import cli

__all__ = ["command"]


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run ``fedgraft`` in this process: exit code, stdout, stderr."""
    before = sys.argv
    sys.argv = ["fedgraft", *arguments]
    try:
        with pytest.raises(SystemExit) as left:
            cli.main()
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err
