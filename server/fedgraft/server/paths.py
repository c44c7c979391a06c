"""The paths of the coordinator's files."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Home"]


@dataclass(frozen=True)
class Home:
    """The coordinator's folder."""

    folder: Path

    @property
    def runs(self) -> Path:
        """The folder of the run folders."""
        return self.folder / "runs"

    @property
    def sockets(self) -> Path:
        """The folder of our services' sockets."""
        return self.folder / "run"

    @property
    def logs(self) -> Path:
        """The folder of the processes' output."""
        return self.folder / "logs"

    @property
    def roster(self) -> Path:
        """The path of the federation file of the sites that joined."""
        return self.folder / "roster.toml"

    def file(self, name: str) -> Path:
        """Return the path of the file ``name`` in this folder."""
        return self.folder / name
