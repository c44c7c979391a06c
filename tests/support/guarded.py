"""Sites with a policy, for tests: a consortium's sites with a policy file and an audit each."""

import json
from pathlib import Path
from typing import Any

import tomli_w
from support.masked_federations import SIZES, Consortium, site_file
from support.masked_talk import Node

from fedgraft.common.adapters.model import open_workbench
from fedgraft.common.federation.audit_log import read

__all__ = ["Guarded"]


class Guarded(Node):
    """Site ``name`` of a consortium, behind a policy that lets its job through but for changes."""

    def __init__(self, consortium: Consortium, name: str = "ash", **changes: Any) -> None:
        super().__init__(consortium.node(name))
        self.folder = consortium.folder / f"{name}-site"
        self.folder.mkdir(exist_ok=True)
        self.place = Path(self.config["state"])
        train = site_file(name, SIZES[consortium.names.index(name)]).parent / "train.parquet"
        site = {"name": name, "device": "cpu", "policy": "policy.toml", "state": str(self.place)}
        self.site = self.folder / "site.toml"
        self.site.write_text(tomli_w.dumps(site | {"data": {"train": str(train)}}))
        self.config["site"] = str(self.site)
        fingerprint = open_workbench(consortium.job).backbone.fingerprint
        self.rules: dict[str, Any] = {
            "model": {
                "allowed_backbones": {"glyph-vit": f"sha256:{fingerprint}"},
                "allowed_methods": ["lora", "head"],
            },
            "privacy": {"min_examples": 1, "min_local_steps": 1, "min_cohort": 3},
            "limits": {},
            "metrics": {"allowed": ["loss", "accuracy", "f1"]},
            "approval": {"mode": "auto"},
        }
        self.rule(**changes)

    def rule(self, **changes: Any) -> None:
        """Write the policy, these keys of these sections changed."""
        for section, keys in changes.items():
            self.rules[section] |= keys
        (self.folder / "policy.toml").write_text(tomli_w.dumps(self.rules))

    @property
    def audit(self) -> Path:
        return self.place / "audit.jsonl"

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The audit, checked."""
        return list(read(self.audit))

    @property
    def said(self) -> list[tuple[str, str, str]]:
        """What the audit says of each reply: stage, decision, code."""
        out = [line for line in self.lines if line["direction"] == "out"]
        return [(line["stage"], line["decision"], line["code"]) for line in out]

    @property
    def sent(self) -> list[Path]:
        """Files that were kept of what was sent."""
        return sorted((self.place / "sent").rglob("*.npz"))

    def approval(self, session: str) -> dict[str, Any]:
        """What became of a proposal."""
        text = (self.place / "approvals" / f"{session}.json").read_text()
        found: dict[str, Any] = json.loads(text)
        return found
