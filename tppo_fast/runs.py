"""What every kind of run starts with, beside its folder: its device, its sessions, its log."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.markup import escape

from tppo_fast import seeding
from tppo_fast.atomic import write_atomic
from tppo_fast.config import DataConfig, RunConfig
from tppo_fast.data import prompt_file
from tppo_fast.data.sessions import Session, of_many_users, read_sessions, split_by_user
from tppo_fast.data.synthetic import generate_sessions
from tppo_fast.errors import TrainingDiverged, UserError
from tppo_fast.interrupt import Interrupted, InterruptGuard
from tppo_fast.metrics import MetricsLogger
from tppo_fast.progress import say
from tppo_fast.rollout import SamplingParams
from tppo_fast.run_dir import step_of


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
            raise Interrupted.after(step_of(saved), saved) from None
        except TrainingDiverged as error:
            report = run_dir / f"diverged_step_{error.report['step']:06d}.json"
            write_atomic(report, json.dumps(error.report, indent=2).encode())
            raise


def due(step: int, every: int, last: int) -> bool:
    """Whether what is done every so many steps and after the last one is due; ``every`` 0: after the last one alone."""
    return step == last or (every > 0 and step % every == 0)


GROWING = "expandable_segments:True"


def growing_segments(config: RunConfig) -> None:
    """Let torch's GPU allocator grow its segments (``expandable_segments``), where nobody has configured it.

    Packed batches differ in size from step to step, and segments of fixed size would fragment until cached memory has to be
    given back. It must be said before the first tensor is on the GPU, and not where vLLM sleeps in this process: its pool wants
    fixed pages.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    sleeps = config.rollout.engine == "vllm" and config.vllm.process != "server" and config.vllm.sleep != "off"
    late = resolve_device(config.device).type != "cuda" or torch.cuda.memory_reserved() > 0
    if not sleeps and not late and not any(name in os.environ for name in names):
        os.environ["PYTORCH_ALLOC_CONF"] = GROWING
        if torch.cuda.is_initialized():  # as an import of torchao does, among others: the variable has been read
            torch._C._accelerator_setAllocatorSettings(GROWING)


def resolve_device(name: str) -> torch.device:
    """ "auto" becomes CUDA where there is a GPU.

    Raises:
        UserError: CUDA was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError('device = "cuda", but torch sees no CUDA device: use "auto" or "cpu"')
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def load_sessions(config: RunConfig) -> tuple[list[Session], list[Session]]:
    """(training, held-out) sessions as configured; the first n held-out ones are of as many users as n can be."""
    data = config.data
    synthetic = data.train == "synthetic"
    sessions = generate_sessions(data.synthetic_sessions, config.seed) if synthetic else read_sessions(data.train)
    if data.eval is None:
        sessions, held_out = split_by_user(sessions, data.eval_fraction, data.split_seed)
    else:
        held_out = read_sessions(data.eval)
        _tell_of_shared_users(data, sessions, held_out)
    return sessions, of_many_users(held_out)


def _tell_of_shared_users(data: DataConfig, sessions: Sequence[Session], held_out: Sequence[Session]) -> None:
    users = {session.user_id for session in held_out}
    both = len(users.intersection(session.user_id for session in sessions))
    if both and data.train != "synthetic":  # generated users have the same names in all files
        say(
            f"[yellow]warning[/]: {both} of the {len(users)} users of data.eval = {escape(repr(data.eval))} are in data.train, "
            "too: what is measured there is not held out; give them to one side alone"
        )


def warn_of_other_prompts(policy: str | Path, data: DataConfig) -> None:
    """Tell of a policy that was trained on prompts written otherwise than ``data`` says."""
    if changed := prompt_file.change(policy, data):
        say(f"[yellow]warning[/]: {escape(changed)}: it will not do what it has learned; use one of the two throughout")


def eval_sampling(config: RunConfig, n: int = 1) -> SamplingParams:
    """How to sample in an evaluation: the same seed every time, so that evaluations differ by the weights alone."""
    return SamplingParams(
        n=n,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=1.0 if config.train.eval_greedy else config.rollout.temperature,
        greedy=config.train.eval_greedy,
        seed=seeding.derive(config.seed, "eval"),
    )
