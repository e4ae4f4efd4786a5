"""Ctrl-C, or a scheduler's SIGTERM, ends a run at a safe point: nothing half-updated, a checkpoint saved."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar


class Interrupted(KeyboardInterrupt):
    """The person asked to stop; the message says where the run was saved. The shell exits with 130.

    A ``KeyboardInterrupt``, so that a sweep's ``except Exception`` does not go on with the next run.
    """

    @classmethod
    def after(cls, step: int, saved: Path) -> Interrupted:
        """A run of optimizer steps, stopped with a checkpoint."""
        return cls(
            f"stopped after step {step}, saved in {saved}; continue with --resume (resume=True; compare, demo: the same "
            "command)"
        )


class InterruptGuard:
    """Inside ``with InterruptGuard() as guard`` a signal only raises a flag, which ``guard.check()`` turns into ``Interrupted``.

    A second one stops at once, without saving.
    """

    _entered: ClassVar[list[InterruptGuard]] = []

    def __init__(self) -> None:
        self._asked = False
        self._pid = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> InterruptGuard:
        self._entered.append(self)
        with contextlib.suppress(ValueError):  # not the main thread: Python delivers signals there, nothing to guard
            self._before = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM and os.getpid() != self._pid:  # a forked process, which its parent ends so
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if self._asked:
            signal.default_int_handler(number, frame)
        self._asked = True

    def check(self) -> None:
        """Raise ``Interrupted`` if a signal arrived since the guard was entered."""
        if self._asked:
            raise Interrupted

    @classmethod
    def check_any(cls) -> None:
        """``check`` every guard that is entered: for what would take long and knows of no guard."""
        for guard in cls._entered:
            guard.check()

    def __exit__(self, *_: object) -> None:
        self._entered.remove(self)
        for number, before in self._before.items():
            if before is not None:
                signal.signal(number, before)
