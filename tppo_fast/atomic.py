"""Files and folders that appear complete or not at all, whatever kills the process; and that one process writes at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import IO, Any
from weakref import WeakSet

from tppo_fast.errors import UserError

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""What a file system without locks answers; there, nothing is locked."""
_locked: WeakSet[IO[Any]] = WeakSet()
"""What a forked process closes; a file leaves it with its last user."""


def write_atomic(path: Path, content: bytes) -> None:
    """Replace ``path`` in one step: a reader, or a kill at any moment, sees the old file or the new one, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class atomic_folder:
    """``with atomic_folder(path) as temporary``: fill it; on success it is synced to disk and becomes ``path``.

    An old folder there is set aside until the new one is in place. A kill between the two loses neither: the next
    ``atomic_folder(path)`` puts the old one back first.

    Raises:
        OSError: also where safetensors says in its own way that a file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._aside = path.with_name(f".{path.name}.old.tmp")

    def __enter__(self) -> Path:
        if self._aside.exists() and not self._path.exists():
            self._aside.rename(self._path)
        for left in self._path.parent.glob(f".{self._path.name}.*.tmp"):
            shutil.rmtree(left, ignore_errors=True)  # a killed run's half-written folder
        self._temporary.mkdir(parents=True)
        return self._temporary

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            if kind.__name__ == "SafetensorError":  # by name: writing needs no torch
                raise OSError(f"{self._path}: {error}") from error
            return
        for path in [*self._temporary.rglob("*"), self._temporary]:
            _fsync(path)
        if self._path.exists():
            self._path.rename(self._aside)
        self._temporary.rename(self._path)
        _fsync(self._path.parent)
        if self._aside.exists():
            shutil.rmtree(self._aside)


def lock(file: IO[Any], refusal: str) -> None:
    """Lock an open file until it is closed or this process ends; processes that it forks do not keep the lock.

    Raises:
        UserError: saying ``refusal``, another process has locked it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(refusal) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    _locked.add(file)


def _close_locked() -> None:
    for file in list(_locked):
        file.close()


os.register_at_fork(after_in_child=_close_locked)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
