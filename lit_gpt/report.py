"""What a run tells its user: progress on the terminal, a row of metrics per step, and a closing summary."""

import csv
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from lit_gpt import files


def say(*lines: str) -> None:
    """Lines on stderr, at once; empty ones are left out."""
    for line in filter(None, lines):
        print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 under an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """A bar on a terminal; elsewhere a plain line every few seconds. All of it on stderr.

    The first lines wait: work that is over in two seconds says nothing.
    """

    def __init__(self, title: str, total: float, *, begun: float = 0.0, every_s: float = 10.0, enabled: bool = True):
        """`begun` is what of the total was done before."""
        self.title, self.total, self.begun, self.every_s, self.enabled = title, total, begun, every_s, enabled
        self.started = time.monotonic()
        self._said = self.started + 2.0 - every_s
        self._first: tuple[float, float] | None = None  # when the first step was over, and what was done then
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if self.enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
            times = (
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
            )
            self._bar = Bar(*columns, *times, console=Console(stderr=True))
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.begun, figures="")
            self._bar.start()
        return self

    def update(self, done: float, figures: str = "") -> None:
        """Say how much is done and, from the second time on, how long the rest takes: a first step begins cold."""
        now = time.monotonic()
        self._first = at, before = self._first or (now, done)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, figures=figures)
        elif self.enabled and (now - self._said >= self.every_s or (done >= self.total and self._said > self.started)):
            self._said = now
            share = done / self.total if self.total else 1.0
            left = f"{duration((now - at) * (self.total - done) / (done - before))} left" if done > before else ""
            parts = [f"{self.title} {share:4.0%}", figures, left if share < 1 else "done"]
            print(" | ".join(part for part in parts if part), file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self.enabled:
            print(text, file=sys.stderr, flush=True)

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()


class Metrics:
    """metrics.csv: one row per logged step, on the disk as soon as it is known."""

    COLUMNS = ("step", "iteration", "epoch", "tokens", "loss", "val_loss", "learning_rate", "grad_norm", "tokens_per_s")

    def __init__(self, path: Path, *, begun: str = "", enabled: bool = True):
        """`begun` is the text that a run which is continued had written."""
        self.path, self.enabled = path, enabled
        if enabled:
            files.save_text(path, begun or ",".join(self.COLUMNS) + "\r\n")

    def write(self, **values: float) -> None:
        if self.enabled:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.COLUMNS).writerow(values)

    def flush(self) -> int:
        """See that all rows are on the disk; returns the file's size in bytes."""
        if not self.enabled:
            return 0
        with open(self.path, "ab") as file:
            os.fsync(file.fileno())
            return file.tell()


def table(rows: Sequence[tuple[str, ...]], title: str = "") -> str:
    """Rows of text as aligned columns; the first is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(([title] if title else []) + lines)
