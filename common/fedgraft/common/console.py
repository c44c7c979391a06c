"""The only module that prints: results to stdout, progress and notes to stderr.

On a terminal, progress is a live line with the time left. Elsewhere it is one plain line per step,
so that a log file stays readable.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console as Rich
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from fedgraft.common.errors import FedgraftError

__all__ = ["Console", "Steps", "print_error"]


class Steps(Protocol):
    """The progress of a long task, counted in steps."""

    def done(self, text: str) -> None:
        """Count one more step as done; ``text`` is its result."""
        ...

    def within(self, share: float, text: str) -> None:
        """Report that ``share`` (0 to 1) of the current step is done."""
        ...


class Console:
    """The output of a verb; ``quiet`` keeps only results, ``as_json`` only one object."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self._err = Rich(stderr=True, highlight=False, soft_wrap=True)
        self._out = Rich(highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a line on stderr."""
        if not self.quiet:
            self._err.print(text, markup=False)

    def text(self, text: str) -> None:
        """Print a line of the result, unless the result is JSON."""
        if not self.as_json:
            self._out.print(text, markup=False)

    def json(self, value: Any) -> None:
        """Print the result as JSON, if JSON was requested."""
        if self.as_json:
            sys.stdout.write(json.dumps(value, indent=1) + "\n")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table of the result; only its first and its last column are left-aligned."""
        if self.as_json:
            return
        table = Table(
            title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False
        )
        for index, name in enumerate(columns):
            inner = 0 < index < len(columns) - 1
            table.add_column(name, justify="right" if inner else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))  # rich reads a plain str as markup
        # with soft_wrap long cells would go beyond the table's edge
        self._out.print(table, soft_wrap=False)

    @contextmanager
    def steps(self, title: str, total: int, done: int = 0) -> Iterator[Steps]:
        """Show the progress of ``total`` steps, of which ``done`` are already finished."""
        if self.quiet:
            yield _Silent()
        elif self._err.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            with Progress(*columns, console=self._err) as progress:
                task = progress.add_task(title, total=total, completed=done, text="")
                yield _Live(progress, task)
        else:
            yield _Lines(self, title, total, done)

    @contextmanager
    def transfer(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """Show transferred bytes with rate and time left; call with (bytes done, total bytes)."""
        if self.quiet:
            yield lambda done, total: None
        elif self._err.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                DownloadColumn(),
                TransferSpeedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self._err) as progress:
                task = progress.add_task(title, total=None)
                yield lambda done, total: progress.update(task, completed=done, total=total)
        else:
            yield _Tenths(self, title)


class _Tenths:
    """One line for each tenth of a transfer, for a log."""

    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title, self._said = console, title, 0

    def __call__(self, done: int, total: int) -> None:
        tenths = 10 * done // max(total, 1)
        if tenths > self._said:
            self._said = tenths
            self._console.note(f"{self._title} {done / 1e6:,.1f}/{total / 1e6:,.1f} MB")


class _Silent:
    def done(self, text: str) -> None:
        """Print nothing."""

    def within(self, share: float, text: str) -> None:
        """Print nothing."""


class _Live:
    def __init__(self, progress: Progress, task: Any) -> None:
        self._progress, self._task = progress, task
        self._done = progress.tasks[0].completed

    def done(self, text: str) -> None:
        """Move the bar by one step."""
        self._done += 1
        self._progress.update(self._task, completed=self._done, text=text)

    def within(self, share: float, text: str) -> None:
        """Move the bar by a part of a step."""
        self._progress.update(self._task, completed=self._done + share, text=text)


class _Lines:
    def __init__(self, console: Console, title: str, total: int, done: int) -> None:
        self._console, self._title, self._total, self._done = console, title, total, done

    def done(self, text: str) -> None:
        """Print a line."""
        self._done += 1
        self._console.note(f"{self._title} {self._done}/{self._total}  {text}")

    def within(self, share: float, text: str) -> None:
        """Print nothing: one line per step is enough for a log."""


def print_error(error: FedgraftError) -> None:
    """Print ``error:`` with the problem and ``hint:`` with the next step, on stderr."""
    sys.stderr.write(f"error: {error}\n")
    if error.hint:
        sys.stderr.write(f"hint: {error.hint}\n")
