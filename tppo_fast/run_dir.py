"""The folder of a run: its checkpoints, who may start or go on in it, and that one run at a time does. Torch-free."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tppo_fast.atomic import lock, write_atomic
from tppo_fast.errors import UserError
from tppo_fast.hashing import sha256_of
from tppo_fast.metrics import METRICS_FILE
from tppo_fast.progress import say
from tppo_fast.sections import Section, by_name, first_change

MARKER = ".tppo-fast"
"""Says that what else lies in a folder without a checkpoint is a run's, which never saved any. It holds the hashes of the files
that the run starts from."""
LOCK = ".tppo-fast.lock"
"""Locked while a run is in the folder; nothing is written to it."""
INPUTS = ("model.path", "reward.model", "backbone.path", "data.train", "data.eval", "data.labels")
"""Settings that name those files."""


FREE = {
    "run_dir", "processes", "threads", "train", "rollout.parity_gate", "rollout.parity_mean_limit", "rollout.parity_max_limit",
    "vllm.url", "vllm.transfer", "vllm.trainer_address", "vllm.bucket_mib", "vllm.timeout", "vllm.retries",
}  # fmt: skip
"""Settings and sections that may differ when a run is resumed; all others would change what the run computes. (As many processes
and threads make it go on bit for bit; with others, it samples and rounds otherwise.)"""
COMPLETE = "state.json"
"""A folder without it is no checkpoint."""


NUMBER = int | float
STATE = {
    "config": dict, "param_groups": list, "rng": {"python": list, "numpy": dict, "torch": list, "cuda": list},
    "ppo": {"step": int, "kl_coef": NUMBER, "scheduler": dict}, "pending": dict | None, "step": int, "scheduler": dict,
    "best": {"step": int, "evaluation": dict, "loss": NUMBER, "looks_without_gain": int},
}  # fmt: skip
"""What ``COMPLETE`` may hold, of any kind of run, and of which type."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a kind of run has in its folder."""

    result: str
    """What a finished run leaves."""
    unsaved: Sequence[str]
    """Names of what it writes before its first checkpoint; a new run removes what such a one left."""
    free: Collection[str]
    """Settings that may differ on resume."""


POLICY = Kind("policy", ("tensorboard", METRICS_FILE), FREE)
"""A run of ``train``, ``sft`` or ``dpo``."""
REWARD_MODEL = Kind("model", (METRICS_FILE,), {"run_dir", "threads", "resamples"})
"""A run of ``reward-model``."""


@contextlib.contextmanager
def open_run_dir(config: Any, resume: bool, kind: Kind = POLICY) -> Iterator[Path | None]:
    """The checkpoint to start from, or None for a new run in a folder that holds no other run.

    No other run can open the folder meanwhile. A run that ends by bad input before it has written anything leaves nothing behind.

    Args:
        config: its ``run_dir`` is opened.
        resume: continue the newest checkpoint there.
        kind: of the run.

    Raises:
        UserError: as ``check``; or the folder cannot be made, or the files that its run began with have changed.
    """
    check(config, resume, kind)
    with _resumed(config, kind) if resume else _fresh(config, kind) as start_from:
        yield start_from


def check(config: Any, resume: bool, kind: Kind = POLICY) -> None:
    """Look at ``config.run_dir`` without writing to it.

    Raises:
        UserError: the folder holds a run, or none that could be resumed, or files of another kind, or is in use.
    """
    run_dir: Path = config.run_dir
    if (run_dir / LOCK).exists():
        with _locked(run_dir):
            pass  # that another run is there is said before anything of what it has written so far
    if resume:
        check_resumable(run_dir, config, kind.free)
    elif list_checkpoints(run_dir) or (run_dir / kind.result).exists():
        raise UserError(
            f"run_dir = {str(run_dir)!r} holds a run already: continue it with --resume (resume=True), or choose another"
        )
    elif (left := [*_left(run_dir, kind), *step_folders(run_dir), *bests(run_dir)]) and not (run_dir / MARKER).exists():
        name = str(left[0].relative_to(run_dir))
        raise UserError(
            f"run_dir = {str(run_dir)!r} has a {name!r} that no unfinished run left: choose another, or remove it"
        )


def _left(run_dir: Path, kind: Kind) -> list[Path]:
    """What a run that saved nothing left."""
    return [path for name in kind.unsaved for path in run_dir.glob(name)]


@contextlib.contextmanager
def _resumed(config: Any, kind: Kind) -> Iterator[Path]:
    """The newest checkpoint of the run in ``config.run_dir``, while no other run can open it."""
    with _locked(config.run_dir):
        start_from = check_resumable(config.run_dir, config, kind.free)
        _check_inputs(config, _noted(config.run_dir / MARKER))
        yield start_from


@contextlib.contextmanager
def _fresh(config: Any, kind: Kind) -> Iterator[None]:
    """``config.run_dir``, made and marked as a run's, while no other run can open it; a refused run leaves nothing there."""
    run_dir: Path = config.run_dir
    marker = run_dir / MARKER
    new = not run_dir.exists()
    make_run_dir(run_dir)
    with _locked(run_dir) as lock_file:
        if left := _left(run_dir, kind):
            say(
                f"run_dir = {str(run_dir)!r}: the run there saved nothing and is started over",
                markup=False,
                soft_wrap=True,
            )
        for path in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            write_atomic(marker, json.dumps(_inputs(config)).encode())
            yield
        except UserError:
            if {path.name for path in run_dir.iterdir()} <= {MARKER, LOCK}:
                marker.unlink(missing_ok=True)
                lock_file.unlink()
                if new:
                    run_dir.rmdir()
            raise


def make_run_dir(run_dir: Path) -> None:
    """Make the folder of a run where there is none.

    Raises:
        UserError: it cannot be made.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir = {str(run_dir)!r} cannot be made ({error.strerror}): choose another") from None


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[Path]:
    path = run_dir / LOCK
    with path.open("a") as file:
        lock(file, f"run_dir = {str(run_dir)!r} is in use by another run: wait for it, stop it, or choose another")
        yield path


def _noted(marker: Path) -> dict[str, str]:
    """The hashes that a run began with; none where it noted none."""
    try:
        noted = json.loads((marker.read_text() if marker.exists() else "") or "{}")
        if not isinstance(noted, dict):
            raise ValueError("it holds no hashes")
    except ValueError as error:
        raise UserError(
            f"{str(marker)!r} is damaged ({error}): remove it to resume without knowing whether the model and data changed"
        ) from None
    return noted


def _inputs(config: Section) -> dict[str, str]:
    """Hashes of the files and model folders that settings name, under ``setting = path``."""
    values = by_name(config.model_dump(mode="json"))
    named = {name: values[name] for name in INPUTS if values.get(name) not in (None, "", "synthetic", "scratch")}
    found = {}
    for name, path in named.items():
        try:
            if Path(path).exists():
                found[f"{name} = {path!r}"] = sha256_of(Path(path))
        except OSError as error:
            raise UserError(f"{name} = {path!r} cannot be read ({error.strerror}): give one that can") from None
    return found


def _check_inputs(config: Any, began_with: dict[str, str]) -> None:
    """Refuse to resume from other files than the run began with, as far as it noted them."""
    for name, digest in _inputs(config).items():
        if began_with.get(name, digest) != digest:
            raise UserError(
                f"{name} has changed since the run in {str(config.run_dir)!r} began: put back what it was, or start again in "
                "another run_dir"
            )


def step_folders(run_dir: Path) -> list[Path]:
    """Folders of checkpoints, oldest first; some may be what a kill left of dropped ones."""
    return sorted((p for p in (run_dir / "checkpoints").glob("step_*") if p.name[5:].isdigit()), key=step_of)


def step_of(folder: Path) -> int:
    """The step that a checkpoint is of."""
    return int(folder.name.removeprefix("step_"))


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return [p for p in step_folders(run_dir) if (p / COMPLETE).is_file()]


def best_of(run_dir: Path, step: int) -> Path:
    """Where a run keeps the weights of ``step`` while they are its best."""
    return run_dir / f"best-{step:06d}"


def bests(run_dir: Path) -> list[Path]:
    """Every folder of such weights."""
    return [path for path in run_dir.glob("best-*") if path.name[5:].isdigit()]


def check_resumable(run_dir: Path, config: Section, free: Collection[str]) -> Path:
    """The newest checkpoint, if ``config`` may continue it; the settings and sections in ``free`` may differ.

    Raises:
        UserError: there is no checkpoint, it is damaged, or a setting that changes the result differs.
    """
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        raise UserError(
            f"run_dir = {str(run_dir)!r}: there is no checkpoint to resume; leave out --resume (resume=True) to start afresh"
        )
    saved, now = read_state(checkpoints[-1])["config"], config.model_dump(mode="json")
    if changed := first_change(saved, now, free):
        name, was, is_now = changed
        raise UserError(
            f"{name} = {is_now!r}, but the run in {str(run_dir)!r} has {was!r}: use the same value to resume, or "
            "another run_dir"
        )
    _check_length(step_of(checkpoints[-1]), by_name(saved), by_name(now))
    return checkpoints[-1]


def _check_length(done: int, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Whether the run can end at ``train.steps``: not before it stands there, nor elsewhere than its schedule says."""
    was, steps = saved.get("train.steps"), now.get("train.steps")
    if steps is not None and steps < done:
        raise UserError(f"train.steps = {steps}, but the run stands at step {done}: give at least as many to resume")
    for name, schedule in now.items():
        if name.endswith(".lr_schedule") and schedule != "constant" and steps != was:
            raise UserError(
                f"train.steps = {steps}, but the run has {was}, over which {name} = {schedule!r} is laid: use the same value to "
                "resume, or another run_dir"
            )


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's ``state.json``."""
    try:
        state = json.loads((folder / COMPLETE).read_text())
        if not isinstance(state, dict) or "config" not in state:
            raise ValueError(f"{COMPLETE} holds no settings")
        _check_state(state, STATE, COMPLETE)
    except (OSError, ValueError) as error:
        raise UserError(
            f"checkpoint {str(folder)!r} is damaged ({error}): remove it to resume the one before"
        ) from None
    return state


def _check_state(state: dict[str, Any], known: Mapping[str, Any], where: str) -> None:
    """ValueError for a key that no run writes, or a value of another type than it writes."""
    for name, value in state.items():
        if name not in known:
            raise ValueError(f"{where} has {name!r}, which no run writes")
        kind = known[name]
        if isinstance(value, bool) or not isinstance(value, dict if isinstance(kind, Mapping) else kind):
            raise ValueError(f"{where} has a {type(value).__name__} as {name}")
        if isinstance(kind, Mapping):
            _check_state(value, kind, name)
