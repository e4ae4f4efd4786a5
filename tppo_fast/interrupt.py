"""Ctrl-C, a scheduler's SIGTERM or a closed terminal ends a run at a safe point: nothing half-updated, a checkpoint saved."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

INTERRUPTED = "interrupted: nothing new was saved"
"""What is said where no guard waited for a signal, or of the second one."""
FROM_OUTSIDE = (signal.SIGTERM, signal.SIGHUP)
"""What ends a process that does nothing about it. SIGHUP is left ignored where nohup has it so."""


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

    The first one says so on stderr; a second one stops at once, without saving. (Not of a closed terminal, whose shell tells a
    run of it twice.)

    Args:
        until: when the next check comes, for what is said.
    """

    _entered: ClassVar[list[InterruptGuard]] = []

    def __init__(self, until: str) -> None:
        self._said = f"\nstopping {until}; once more to stop at once, without saving\n".encode()
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> InterruptGuard:
        self._entered.append(self)
        handler = _in_this_process(self._on_signal)
        with contextlib.suppress(ValueError):  # not the main thread: Python delivers signals there, nothing to guard
            self._before = {s: signal.signal(s, handler) for s in (signal.SIGINT, *_heeded())}
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number != signal.SIGHUP:
            signal.default_int_handler(number, frame)
        self._asked = True
        with contextlib.suppress(OSError):
            os.write(2, self._said)  # not print: the signal may have come in the middle of one

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


def end_as_ctrl_c_does() -> None:
    """From now on SIGTERM and SIGHUP raise ``KeyboardInterrupt`` in this process, wherever no guard is entered."""
    for number in _heeded():
        signal.signal(number, _in_this_process(signal.default_int_handler))


def _heeded() -> list[signal.Signals]:
    return [number for number in FROM_OUTSIDE if signal.getsignal(number) is not signal.SIG_IGN]


def _in_this_process(handler: Callable[[int, FrameType | None], Any]) -> Callable[[int, FrameType | None], None]:
    """The handler, for this process alone: one forked from it, which its parent ends by such a signal, just ends."""
    pid = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if number in FROM_OUTSIDE and os.getpid() != pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        handler(number, frame)

    return handle
