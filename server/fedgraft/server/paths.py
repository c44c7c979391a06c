"""Where the coordinator keeps what."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Home"]


@dataclass(frozen=True)
class Home:
    """The coordinator's folder."""

    folder: Path

    @property
    def runs(self) -> Path:
        """Run folders."""
        return self.folder / "runs"

    @property
    def sockets(self) -> Path:
        """Sockets of our services."""
        return self.folder / "run"

    @property
    def logs(self) -> Path:
        """What the processes print."""
        return self.folder / "logs"

    @property
    def roster(self) -> Path:
        """The federation file of the sites that joined."""
        return self.folder / "roster.toml"

    def file(self, name: str) -> Path:
        """A file of this folder."""
        return self.folder / name
