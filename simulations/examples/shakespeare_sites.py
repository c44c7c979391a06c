"""Write tiny Shakespeare as sites, one a speaking role: tables of speeches.

    python shakespeare_sites.py "$FEDGRAFT_DATA/data/tinyshakespeare" shakespeare

The text is a run of speeches, each below the line ``ROLE:`` and before an empty line. The last
fifth of a role's speeches is for testing: what it says later in the plays. Only the roles that say
most become sites; most of the others say a few lines.
"""

import json
import re
import sys
from pathlib import Path

__all__ = ["write_sites"]

SPEECH = re.compile(r"^([^\n:]+):\n([^\n].*?)(?:\n\n|\Z)", re.M | re.S)
SITES = 10
TESTED = 5  # one speech in so many


def write_sites(source: Path, folder: Path, sites: int = SITES) -> list[str]:
    """Write ``folder/{role}/{train,test}.jsonl`` with the column ``text``.

    Returns the roles, those that say most first.

    Raises:
        FileNotFoundError: there is no ``input.txt`` in ``source``.
    """
    spoken: dict[str, list[str]] = {}
    for role, speech in SPEECH.findall((source / "input.txt").read_text(encoding="utf-8")):
        spoken.setdefault(role, []).append(speech)
    most = sorted(spoken, key=lambda role: -sum(map(len, spoken[role])))[:sites]
    for role in most:
        speeches = spoken[role]
        cut = len(speeches) - len(speeches) // TESTED
        target = folder / role.lower().replace(" ", "-")
        target.mkdir(parents=True, exist_ok=True)
        for split, chosen in (("train", speeches[:cut]), ("test", speeches[cut:])):
            lines = "".join(json.dumps({"text": speech}) + "\n" for speech in chosen)
            (target / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return most


if __name__ == "__main__":
    print(*write_sites(Path(sys.argv[1]), Path(sys.argv[2])), sep="\n")
