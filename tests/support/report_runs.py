"""Made-up runs for tests of the report, and what must hold for every page."""

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from fedgraft.common.metrics.intervals import wilson_interval
from fedgraft.server.report.page import write_report

__all__ = [
    "Record",
    "assert_sound",
    "make_round",
    "make_run",
    "make_site",
    "measured",
    "metrics",
    "visible",
    "with_insights",
    "written",
]

Record = dict[str, Any]

VOID = {"meta", "br", "img", "link", "hr", "input"}


def metrics(accuracy: float, examples: int = 200) -> Record:
    low, high = wilson_interval(round(accuracy * examples), examples)
    return {
        "accuracy": accuracy, "macro_f1": accuracy - 0.02, "loss": 1.5 - accuracy,
        "accuracy_interval": [low, high], "macro_f1_interval": [low - 0.02, high - 0.02],
    }  # fmt: skip


def measured(accuracy: float) -> Record:
    """What a job that asks for scores and groups adds to a model's metrics."""
    groups = {"f": {"examples": 90, "accuracy": accuracy}, "m": None}
    return {
        "auroc": accuracy + 0.05, "auroc_error": 0.004, "calibration_error": 0.031,
        "calibration_error_bound": 0.005, "weighted_f1": accuracy, "balanced_accuracy": accuracy,
        "groups": groups, "accuracy_gap": 0.0123,
    }  # fmt: skip


def make_site(number: int, outcome: str = "helped") -> Record:
    return {
        "name": f"site-{number}", "examples": 800, "test_examples": 200, "shift": None,
        "classes": 4, "federated": metrics(0.9), "central": metrics(0.91),
        "local_only": metrics(0.8), "head_only": metrics(0.7), "zero_shot": metrics(0.3),
        "federated_tuned": metrics(0.92), "verdict": f"Verdict of {number}.", "outcome": outcome,
    }  # fmt: skip


def make_round(number: int, dropped: Sequence[Record] = ()) -> Record:
    return {
        "round": number, "train_loss": 1 / number, "sites": 3 - len(dropped),
        "validation": {"accuracy": 1 - 0.4 / number, "macro_f1": 1 - 0.5 / number,
                       "loss": 0.8 / number, "examples": 90},
        "dropped": list(dropped), "bytes_up": 3_000_000, "bytes_down": 4_000_000,
        "seconds": 61.0, "update_norm": 0.5, "learning_rate": 1e-3,
    }  # fmt: skip


def make_run(
    outcomes: Sequence[str] = ("helped", "helped", "hurt"), rounds: int = 3
) -> tuple[Record, list[Record]]:
    summary = {
        "run": "run-1", "folder": "runs/run-1", "status": "finished",
        "job": {"name": "wards", "task": "text-classification", "labels": ["a", "b", "c", "d"],
                "method": "lora", "rule": "fedavg", "backbone": "hf:some/model"},
        "job_toml": '[job]\nname = "wards"\n', "environment": {"torch": "2.9", "python": "3.12"},
        "engine": "local", "device": "cuda", "seconds": 7325.0, "peak_memory_mb": 2048.0,
        "rounds": rounds, "trained_parameters": 77_000, "total_parameters": 22_000_000,
        "bytes_up_per_site_round": 308_000, "bytes_down_per_site_round": 309_000,
        "protection": {"protocol": "none"},
        "final": {"federated": metrics(0.881, 2000), "central": metrics(0.902, 2000),
                  "local_only": {**metrics(0.704, 2000), "best_accuracy": 0.7931},
                  "head_only": metrics(0.763, 2000), "zero_shot": None},
        "sites": [make_site(number, outcome) for number, outcome in enumerate(outcomes, 1)],
    }  # fmt: skip
    return summary, [make_round(number) for number in range(1, rounds + 1)]


def with_insights(summary: Record) -> Record:
    """The same run with scores and groups counted, what moved, and a map."""
    summary["final"]["federated"] |= measured(0.9)
    summary["sites"][0]["federated"] |= measured(0.8)
    return summary | {
        "moved": [
            {"module": "layers.0.query", "change": 0.5, "relative": 0.125, "low_rank": True},
            {"module": "classifier", "change": 0.25, "relative": None, "low_rank": False},
        ],
        "site_map": {
            "sites": ["a", "b", "c"],
            "explained": 0.875,
            "places": [[0, 1], [1, 0], [-1, -1]],
            "cosine": [[1.0, 0.5, 0.0], [0.5, 1.0, -0.25], [0.0, -0.25, 1.0]],
        },
    }


def written(folder: Path, summary: Record, history: list[Record]) -> str:
    return write_report(folder, summary, history).read_text("utf-8")


def visible(page: str) -> str:
    """The page's text, tags and style taken away."""
    body = re.sub(r"<(style|svg)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", body).replace("\u00a0", " ").split())


class Outline(HTMLParser):
    """Every start tag with its attributes, and whether all tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    @classmethod
    def of(cls, page: str) -> "Outline":
        found = cls()
        found.feed(page)
        found.close()
        assert not found.open
        return found


def assert_sound(page: str) -> None:
    """Self-contained, nothing that runs, balanced, accessible; true of every report."""
    tags = Outline.of(page).tags
    names = [name for name, _ in tags]
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(names)
    assert "<script src" not in page
    for name, attributes in tags:
        assert not [key for key in attributes if key.startswith("on")], (name, attributes)
        for key in ("src", "href", "xlink:href", "action", "srcset"):
            assert (attributes.get(key) or "#").startswith("#"), (name, attributes)
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", page)
    assert not re.search(r"url\((?!#)|@import|@font-face", page)

    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"|labelledby=\"([^\"]+)\"", page)
    assert {part for parts in used for part in parts if part} <= set(ids)

    assert names.count("table") == names.count("caption")
    assert all("scope" in attributes for name, attributes in tags if name == "th")
    plots = [attributes for _, attributes in tags if attributes.get("class") == "plot"]
    assert len(plots) == names.count("svg") == names.count("figure")
    assert all(plot["role"] == "img" and plot["aria-label"] for plot in plots)
    assert not re.search(r"#fe00", page), "a placeholder colour was left"
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(svg)
    assert not re.search(r"\bnan\b|\binf\b|None|Undefined|NaN", visible(page))
