"""Folders that are replaced whole, whatever kills the process; locks."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tppo_fast.atomic import atomic_folder, lock


def write(path: Path, content: str) -> None:
    with atomic_folder(path) as folder:
        (folder / "file").write_text(content)


def test_a_folder_is_replaced_and_leaves_nothing_behind(tmp_path: Path) -> None:
    for content in ("old", "new"):
        write(tmp_path / "a", content)
        assert (tmp_path / "a" / "file").read_text() == content
        assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_kill_while_a_folder_is_replaced_loses_no_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    write(tmp_path / "a", "old")
    left = [steps]

    def until_killed(step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **options: Any) -> Any:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return step(*words, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", until_killed(Path.rename))
        patch.setattr(shutil, "rmtree", until_killed(shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "a", "new")
    assert {(path / "file").read_text() for path in tmp_path.iterdir()} == {"old", "new"}
    with atomic_folder(tmp_path / "a"):
        assert (tmp_path / "a" / "file").read_text() == ("new" if steps == 2 else "old")


def test_a_closed_lock_is_forgotten(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("a") as file:
        lock(file, "in use")
    left = weakref.ref(file)
    del file
    gc.collect()
    assert left() is None
