"""What every kind of run starts with: its folder, its device, its sessions."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tppo_fast import checkpoint, seeding
from tppo_fast.atomic import lock, write_atomic
from tppo_fast.config import RunConfig
from tppo_fast.data.sessions import Session, read_sessions, split_by_user
from tppo_fast.data.synthetic import generate_sessions
from tppo_fast.errors import TrainingDiverged, UserError
from tppo_fast.hashing import sha256_of
from tppo_fast.interrupt import Interrupted, InterruptGuard
from tppo_fast.metrics import METRICS_FILE, MetricsLogger
from tppo_fast.rollout import SamplingParams
from tppo_fast.sections import Section, by_name

MARKER = ".tppo-fast"
"""Says that what else lies in a folder without a checkpoint is a run's, which never saved any. It holds the hashes of the files
that the run starts from."""
LOCK = ".tppo-fast.lock"
"""Locked while a run is in the folder; nothing is written to it."""
INPUTS = ("model.path", "reward.model", "backbone.path", "data.train", "data.eval", "data.labels")
"""Settings that name those files."""


@contextlib.contextmanager
def open_run_dir(
    config: Any,
    resume: bool,
    *,
    result: str = "policy",
    unsaved: Sequence[str] = ("tensorboard", METRICS_FILE),
    free: Collection[str] = checkpoint.FREE,
) -> Iterator[Path | None]:
    """The checkpoint to start from, or None for a new run in a folder that holds no other run.

    No other run can open the folder meanwhile. A run that ends by bad input before it has written anything leaves nothing behind.

    Args:
        config: its ``run_dir`` is opened.
        resume: continue the newest checkpoint there.
        result: what a finished run leaves.
        unsaved: names of what a run writes before its first checkpoint; a new run removes what such a one left.
        free: settings that may differ on resume.

    Raises:
        UserError: the folder holds a run, or none that could be resumed, or files of another kind, is in use or cannot be made,
            or the files that its run began with have changed.
    """
    if (config.run_dir / LOCK).exists():
        with _locked(config.run_dir):
            pass  # that another run is there is said before anything of what it has written so far
    with _resumed(config, free) if resume else _fresh(config, result, unsaved) as start_from:
        yield start_from


@contextlib.contextmanager
def _resumed(config: Any, free: Collection[str]) -> Iterator[Path]:
    """The newest checkpoint of the run in ``config.run_dir``, while no other run can open it."""
    checkpoint.check_resumable(config.run_dir, config, free)  # before a folder that holds no run is written to
    with _locked(config.run_dir):
        start_from = checkpoint.check_resumable(config.run_dir, config, free)
        _check_inputs(config, _noted(config.run_dir / MARKER))
        yield start_from


@contextlib.contextmanager
def _fresh(config: Any, result: str, unsaved: Sequence[str]) -> Iterator[None]:
    """``config.run_dir``, made and marked as a run's, while no other run can open it; a refused run leaves nothing there."""
    run_dir: Path = config.run_dir
    marker = run_dir / MARKER
    if checkpoint.list_checkpoints(run_dir) or (run_dir / result).exists():
        raise UserError(
            f"run_dir = {str(run_dir)!r} holds a run already: continue it with --resume (resume=True), or choose another"
        )
    new = not run_dir.exists()
    make_run_dir(run_dir)
    left = [path for name in unsaved for path in run_dir.glob(name)]
    if left and not marker.exists():
        raise UserError(
            f"run_dir = {str(run_dir)!r} has a {left[0].name!r} that no unfinished run left: choose another, or remove it"
        )
    with _locked(run_dir) as lock_file:
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


@contextlib.contextmanager
def logged(config: RunConfig, start: int, save: Callable[[], Path]) -> Iterator[tuple[MetricsLogger, InterruptGuard]]:
    """The log of a run that goes on from step ``start``, ``stoppable``."""
    logger = MetricsLogger(
        config.run_dir,
        start_step=start,
        tensorboard=config.train.tensorboard,
        wandb_project=config.train.wandb_project,
        config=config.model_dump(mode="json"),
    )
    with logger, stoppable(config.run_dir, save) as guard:
        yield logger, guard


@contextlib.contextmanager
def stoppable(run_dir: Path, save: Callable[[], Path]) -> Iterator[InterruptGuard]:
    """What stops the run leaves a checkpoint of the last finished step, which ``save`` writes, or a report behind."""
    with InterruptGuard("before the next update, with a checkpoint of the last finished step") as guard:
        try:
            yield guard
        except Interrupted:
            saved = save()
            raise Interrupted.after(checkpoint.step_of(saved), saved) from None
        except TrainingDiverged as error:
            report = run_dir / f"diverged_step_{error.report['step']:06d}.json"
            write_atomic(report, json.dumps(error.report, indent=2).encode())
            raise


def due(step: int, every: int, last: int) -> bool:
    """Whether what is done every so many steps and after the last one is due; ``every`` 0: after the last one alone."""
    return step == last or (every > 0 and step % every == 0)


def growing_segments(config: RunConfig) -> None:
    """Let torch's GPU allocator grow its segments (``expandable_segments``), where nobody has configured it.

    Packed batches differ in size from step to step, and segments of fixed size would fragment until cached memory has to be
    given back. It must be said before CUDA starts, and not where vLLM sleeps in this process: its pool wants fixed pages.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    sleeps = config.rollout.engine == "vllm" and config.vllm.process != "server" and config.vllm.sleep != "off"
    late = resolve_device(config.device).type != "cuda" or torch.cuda.is_initialized()
    if not sleeps and not late and not any(name in os.environ for name in names):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def resolve_device(name: str) -> torch.device:
    """ "auto" becomes CUDA where there is a GPU.

    Raises:
        UserError: CUDA was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError('device = "cuda", but torch sees no CUDA device: use "auto" or "cpu"')
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def load_sessions(config: RunConfig) -> tuple[list[Session], list[Session]]:
    """(training, held-out) sessions as configured."""
    data = config.data
    synthetic = data.train == "synthetic"
    sessions = generate_sessions(data.synthetic_sessions, config.seed) if synthetic else read_sessions(data.train)
    if data.eval is not None:
        return sessions, read_sessions(data.eval)
    return split_by_user(sessions, data.eval_fraction, config.seed)


def eval_sampling(config: RunConfig, n: int = 1) -> SamplingParams:
    """How to sample in an evaluation: the same seed every time, so that evaluations differ by the weights alone."""
    return SamplingParams(
        n=n,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=1.0 if config.train.eval_greedy else config.rollout.temperature,
        greedy=config.train.eval_greedy,
        seed=seeding.derive(config.seed, "eval"),
    )
