"""One progress display for every long piece of work: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

PLAIN_INTERVAL = 10.0
"""Fewest seconds between two plain lines."""

TABLE_WIDTH = 160
"""Columns of a table that no terminal shows."""

_bars: RichProgress | None = None  # the one live display; work inside or beside other work adds a bar to it
_users = 0  # bars in it: the last one to end closes it
_lock = threading.Lock()


def table_console() -> Console:
    """Standard output for tables: as wide as the terminal, or wide enough where a file or a log takes them."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)


def say(*objects: object, markup: bool = True, soft_wrap: bool = False) -> None:
    """Print to stderr as rich's console does; a log that cannot be written (no reader, a full disk) ends nothing."""
    from rich.console import Console

    text = io.StringIO()  # rich itself ends the program where nobody reads
    console = Console(file=text, force_terminal=sys.stderr.isatty() or None)
    console.print(*objects, markup=markup, soft_wrap=soft_wrap)
    _write(text.getvalue())


def _write(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, end="", file=sys.stderr, flush=True)


class Progress:
    """``with Progress("train", 100, "it") as progress: ... progress.update(reward=0.31)``, written to stderr.

    On a terminal it is a rich bar with rate, time left and the latest metrics. Elsewhere it is plain lines such as
    ``train 12/100 0.83 it/s ETA 1m46s reward=0.31``: the first, the last, and between them one per ``PLAIN_INTERVAL``.
    ``start`` is what an earlier, resumed run has already done; rate and time left count from there.
    """

    def __init__(self, description: str, total: int, unit: str, start: int = 0) -> None:
        self.description, self.total, self.unit, self.start = description, total, unit, start
        self.done = start
        self._metrics: dict[str, float] = {}
        self._phase, self._named = "", set[str]()
        self._began = self._printed = time.monotonic()
        self._bars: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Progress:
        self._began = self._printed = time.monotonic()
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            self._open_bar()
        else:
            self._print(f"{self.description} {self.done}/{self.total} {self.unit}")
        return self

    def update(self, n: int = 1, **metrics: float) -> None:
        """``n`` more units are done; ``metrics`` replace those shown under the same names."""
        self.done += n
        self._phase = ""
        self._metrics.update(metrics)
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=self.done, status=self._status())
        elif self.done < self.total and time.monotonic() - self._printed >= PLAIN_INTERVAL:
            self._print(f"{self.description} {self.done}/{self.total} {self._status()}")

    def phase(self, name: str, part: str = "") -> None:
        """What the unit under way is at now, ``part`` of it.

        A bar shows it at once. Plain lines name each phase when it first comes, and then after ``PLAIN_INTERVAL`` without a line.
        """
        self._phase = f"{name} {part}".rstrip()
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, status=self._status())
        elif name not in self._named or time.monotonic() - self._printed >= PLAIN_INTERVAL:
            self._named.add(name)
            self._print(f"{self.description} {self.done}/{self.total} {self._status()}")

    def __exit__(self, *_: object) -> None:
        self._phase = ""
        if self._bars is not None and self._task is not None:
            self._close_bar(self._bars, self._task)
        else:
            self._print(f"{self.description} {self.done}/{self.total} {self._status(finished=True)}")

    def _status(self, *, finished: bool = False) -> str:
        elapsed = time.monotonic() - self._began
        rate = (self.done - self.start) / elapsed if elapsed > 0 else 0.0
        words = [self._phase] if self._phase else []
        if rate > 0:
            words.append(_rate(rate, self.unit))
        if finished:
            words.append(f"in {_duration(elapsed)}")
        elif rate > 0:
            words.append(f"ETA {_duration(max(self.total - self.done, 0) / rate)}")
        return " ".join([*words, *(f"{name}={value:.3g}" for name, value in self._metrics.items())])

    def _print(self, line: str) -> None:
        self._printed = time.monotonic()
        _write(f"{line.rstrip()}\n")

    def _open_bar(self) -> None:
        global _bars, _users
        with _lock:
            if _bars is None:
                _bars = _new_bars()
                _bars.start()
            self._bars, _users = _bars, _users + 1
        self._task = self._bars.add_task(
            self.description, total=self.total, completed=self.start, unit=self.unit, status=self._status()
        )

    def _close_bar(self, bars: RichProgress, task: TaskID) -> None:
        global _bars, _users
        bars.update(task, status=self._status(finished=True))
        with _lock:
            _users -= 1
            if _users:
                bars.remove_task(task)
            else:
                bars.stop()
                _bars = None
        self._bars = self._task = None


def _new_bars() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total} {task.fields[unit]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}", markup=False),
        console=Console(stderr=True),
        redirect_stdout=sys.stdout.isatty(),  # a piped stdout must stay what the program printed
    )


def _rate(rate: float, unit: str) -> str:
    return f"{rate:.3g} {unit}/s" if rate >= 0.1 else f"{1 / rate:.3g} s/{unit}"


def _duration(seconds: float) -> str:
    """46s, 1m46s or 2h03m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
