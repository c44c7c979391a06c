"""Write the Free Spoken Digit Dataset as six sites, one a speaker: tables of wav files and digits.

    python simulations/examples/fsdd_sites.py "$FEDGRAFT_DATA/data/fsdd" fsdd

The data set has all recordings in one folder, ``recordings/{digit}_{speaker}_{number}.wav``. As its
authors say, numbers 0 to 4 of every digit and speaker are for testing. Only paths are written; the
recordings stay where they are.
"""

import csv
import sys
from pathlib import Path

__all__ = ["write_sites"]

TESTED = 5


def write_sites(recordings: Path, folder: Path) -> list[str]:
    """Write ``folder/{speaker}/{train,test}.csv`` with columns ``audio`` and ``label``.

    Returns the speakers, in order.

    Raises:
        FileNotFoundError: no recordings are there.
    """
    rows: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for path in sorted(recordings.glob("*_*_*.wav")):
        digit, speaker, number = path.stem.split("_")
        split = "test" if int(number) < TESTED else "train"
        rows.setdefault((speaker, split), []).append((str(path.resolve()), digit))
    if not rows:
        raise FileNotFoundError(f"no recordings in {recordings}")
    for (speaker, split), lines in rows.items():
        target = folder / speaker / f"{split}.csv"
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("audio", "label"), *lines])
    return sorted({speaker for speaker, _ in rows})


if __name__ == "__main__":
    print(*write_sites(Path(sys.argv[1]) / "recordings", Path(sys.argv[2])))
