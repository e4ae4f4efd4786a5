"""Work in a thread that the interpreter's end does not wait for: what nobody waits for must not keep the process alive."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def started(action: Callable[[], T]) -> Future[T]:
    """``action``, begun in a thread of its own."""
    future: Future[T] = Future()
    threading.Thread(target=_finish, args=(future, action), name="background", daemon=True).start()
    return future


def at_once(action: Callable[[], T]) -> Future[T]:
    """``action``, done in this thread: what ``started`` returns, finished."""
    future: Future[T] = Future()
    _finish(future, action)
    return future


def _finish(future: Future[T], action: Callable[[], T]) -> None:
    try:
        future.set_result(action())
    except BaseException as error:
        future.set_exception(error)
