"""Text files that people write."""

from pathlib import Path

from fedgraft.common.errors import JobError

__all__ = ["read_text"]


def read_text(path: Path) -> str:
    """Return the UTF-8 text of a file that a person named.

    Raises:
        JobError: it is missing, a folder, unreadable or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte order mark is not part of a label
    except FileNotFoundError:
        raise JobError(f"no file {path}", hint="`fedgraft init` writes one to start from") from None
    except UnicodeDecodeError as error:
        raise JobError(
            f"{path} is not UTF-8 (byte {error.start})", hint="save the file as UTF-8"
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        raise JobError(f"{str(path)!r} cannot be read: {reason}", hint="check the path") from None
