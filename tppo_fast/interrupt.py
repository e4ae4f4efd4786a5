"""Ctrl-C ends a run at a safe point: nothing half-updated, a checkpoint saved."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """The person asked to stop; the message says where the run was saved. The shell exits with 130."""

    @classmethod
    def after(cls, step: int, saved: Path) -> Interrupted:
        """A run of optimizer steps, stopped with a checkpoint."""
        return cls(
            f"stopped after step {step}, saved in {saved}; continue with --resume (compare, demo: the same command)"
        )


class InterruptGuard:
    """Inside ``with InterruptGuard() as guard`` SIGINT only raises a flag, which ``guard.check()`` turns into ``Interrupted``.

    A second SIGINT stops at once, without saving.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> InterruptGuard:
        try:
            self._before = signal.signal(signal.SIGINT, self._on_signal)
        except ValueError:  # not the main thread: Python delivers signals there, so there is nothing to guard
            self._before = None
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            signal.default_int_handler(number, frame)
        self._asked = True

    def check(self) -> None:
        """Raise ``Interrupted`` if SIGINT arrived since the guard was entered."""
        if self._asked:
            raise Interrupted

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
