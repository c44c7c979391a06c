"""Text files that people write."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fedgraft.common.errors import JobError

__all__ = ["explain_problem", "read_text"]


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


def explain_problem(problem: Mapping[str, Any], file: type[BaseModel]) -> tuple[str, str]:
    """Return a problem that pydantic found in a ``file``: (what is wrong, what to do)."""
    loc = [str(part) for part in problem["loc"]]
    key = ".".join(loc)
    if problem["type"] == "extra_forbidden":
        section: Any = file
        for name in loc[:-1]:
            fields = getattr(section, "model_fields", {})
            section = fields[name].annotation if name in fields else None
        known = list(getattr(section, "model_fields", ()))
        near = difflib.get_close_matches(loc[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        return f"unknown key {key}", hint
    if problem["type"] == "missing":
        return f"{key} is missing", f"add {key}"
    if problem["type"] == "model_type":
        return f"{key}: a section, not a value", f"write [{key}] and its keys below it"
    message = problem["msg"].removeprefix("Value error, ")
    hint = getattr(problem.get("ctx", {}).get("error"), "hint", f"mend {key}")
    return f"{key}: {message}", hint
