"""``fedgraft site audit``: everything that this site received and sent, and whether it is all."""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedgraft.common.console import Console
from fedgraft.common.errors import InputError

if TYPE_CHECKING:
    from fedgraft.common.federation.audit_log import AuditHead

__all__ = ["audit"]

COLUMNS = (
    *("n", "time", "run", "round", "stage", "direction", "decision", "code"),
    *("site", "key"),
    *("tensors.name", "tensors.shape", "tensors.dtype", "tensors.bytes", "tensors.sha256"),
    *("bytes", "sha256", "norm_before", "norm_after", "epsilon", "policy", "hash"),
)


def audit(
    site: Annotated[Path, typer.Option(help="The site's configuration.")] = Path("site.toml"),
    number: Annotated[int | None, typer.Option("--round", help="Only this round.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check the whole chain.")] = False,
    head: Annotated[
        str, typer.Option(metavar="LINES:HASH", help="With --verify: a head kept elsewhere.")
    ] = "",
    export: Annotated[str, typer.Option(help="Write all of it: csv or jsonl.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show, check or export what this site received and sent."""
    from fedgraft.client.membership.state_files import AUDIT
    from fedgraft.client.site_config import load_site

    if export not in ("", "csv", "jsonl"):
        raise InputError(f"--export {export}: no such format", hint="csv or jsonl")
    if head and not verify:
        raise InputError("--head is compared by --verify alone", hint="add --verify")
    path = Path(load_site(site).state) / AUDIT
    console = Console(as_json=as_json)
    if verify:
        _verify(console, path, _known(head))
    elif export:
        _export(path, number, export)
    else:
        _show(console, path, number)


def _known(head: str) -> "AuditHead | None":
    from fedgraft.common.federation.audit_log import AuditHead

    if not head:
        return None
    lines, _, digest = head.partition(":")
    if not lines.isdecimal() or len(digest) != 64:
        raise InputError(f"--head {head} is none", hint="LINES:HASH, as the coordinator shows it")
    return AuditHead(int(lines), digest)


def _verify(console: Console, path: Path, known: "AuditHead | None") -> None:
    from fedgraft.common.federation.audit_log import Audit
    from fedgraft.common.federation.audit_log import verify as check

    lines = check(path, known)
    end = Audit(path).head
    console.json({"lines": lines, "head": f"{end.lines}:{end.hash}", "compared": known is not None})
    console.text(f"{lines} lines, each follows from the one before")
    console.text(f"head {end.lines}:{end.hash}")
    if known is None:
        console.note("compare an earlier head that was kept elsewhere: --verify --head LINES:HASH")


def _of_round(lines: Iterator[dict[str, Any]], number: int | None) -> Iterator[dict[str, Any]]:
    return (line for line in lines if number is None or line.get("round") == number)


def _export(path: Path, number: int | None, form: str) -> None:
    from fedgraft.common.federation.audit_log import read, rows

    if form == "jsonl":
        for line in _of_round(read(path), number):
            sys.stdout.write(json.dumps(line, separators=(",", ":")) + "\n")
        return
    table = csv.DictWriter(sys.stdout, COLUMNS, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    for row in _of_round(rows(path), number):
        table.writerow({key: "" if value is None else value for key, value in row.items()})


def _show(console: Console, path: Path, number: int | None) -> None:
    from fedgraft.common.federation.audit_log import read

    lines = list(_of_round(read(path), number))
    console.json({"lines": lines})
    for line in lines:
        console.text(_in_words(line))
    if not lines:
        console.text("nothing" if number is None else f"nothing in round {number}")


def _in_words(line: dict[str, Any]) -> str:
    words = (line["decision"], line.get("code", ""), line.get("site", ""))
    what = " ".join(word for word in words if word)
    size = f"  {line['bytes']:,} bytes" if "bytes" in line else ""
    names = [tensor["name"] for tensor in line.get("tensors", ())]
    tensors = f" of {names[0]}" if len(names) == 1 else f" of {len(names)} tensors" if names else ""
    when = f"{line['time'][:19]}  {line['run'][:8] or '-':8}  round {line['round']}"
    return f"{line['n']:>6}  {when}  {line['stage']} {line['direction']}  {what}{size}{tensors}"
