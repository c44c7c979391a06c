"""Write C-MAPSS as four sites, one a set: sensors of a cycle as words, and the cycles left.

    cd simulations/examples && python turbofan_sites.py "$FEDGRAFT_DATA/data/turbofan" turbofan

A row is one of every ``EVERY`` cycles of an engine. Each sensor that moves becomes its name and its
place between the lowest and the highest value of the set's training engines, 0 to 99. The target is
the cycles left, at most 125 as is usual (Heimes 2008, "Recurrent Neural Networks for Remaining
Useful Life Estimation"): an engine shows no wear before that.
"""

import csv
import json
import sys
from pathlib import Path

__all__ = ["write_sites"]

EVERY = 15
MOST = 125
SENSORS = ("s2", "s3", "s4", "s7", "s11", "s12", "s15", "s17", "s20", "s21")
NAMES = ("fan", "core", "turbine", "pressure", "static", "fuel", "bypass", "bleed", "high", "low")


def write_sites(folder: Path, target: Path) -> dict[str, tuple[int, int]]:
    """Write ``target/{set}/{train,test}.jsonl`` with ``text`` and ``target``; rows of each.

    Raises:
        FileNotFoundError: no sets are there.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for path in sorted(folder.glob("FD*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        train = [row for row in rows if row["split"] == "train"]
        ranges = {
            name: (min(float(r[name]) for r in train), max(float(r[name]) for r in train))
            for name in SENSORS
        }
        (target / path.stem).mkdir(parents=True, exist_ok=True)
        counts = []
        for split in ("train", "test"):
            mine = [r for r in rows if r["split"] == split and int(r["cycle"]) % EVERY == 0]
            lines = [json.dumps({"text": _words(r, ranges), "target": _left(r)}) for r in mine]
            file_name = target / path.stem / f"{split}.jsonl"
            file_name.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            counts.append(len(lines))
        sizes[path.stem] = (counts[0], counts[1])
    if not sizes:
        raise FileNotFoundError(f"no sets in {folder}")
    return sizes


def _words(row: dict[str, str], ranges: dict[str, tuple[float, float]]) -> str:
    said = []
    for name, word in zip(SENSORS, NAMES, strict=True):
        low, high = ranges[name]
        share = (float(row[name]) - low) / ((high - low) or 1.0)
        said.append(f"{word} {min(max(round(99 * share), 0), 99)}")
    return ", ".join(said)


def _left(row: dict[str, str]) -> int:
    return min(int(row["rul"]), MOST)


if __name__ == "__main__":
    print(write_sites(Path(sys.argv[1]), Path(sys.argv[2])))
