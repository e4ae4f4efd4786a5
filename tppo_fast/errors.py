"""The ways a run can end badly, each with one sentence for the person who started it."""

from __future__ import annotations

from typing import Any


class UserError(ValueError):
    """Bad input or usage: the message names the field, its value and the remedy. The shell exits with 2."""


class EngineError(RuntimeError):
    """The rollout engine does not sample from the trainer's policy, or cannot be brought back. The shell exits with 1."""


class EngineLost(EngineError):
    """The rollout engine's process died or did not answer in time; a new one may take over."""


class ProcessFailed(RuntimeError):
    """One of the processes that share a run failed or is gone. The shell exits with 1."""


class LabellingFailed(RuntimeError):
    """A labeller could not judge, and may later; what was labelled is kept. The shell exits with 1."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        self.final = final  # asking again cannot help: a refused key, an unknown model
        super().__init__(reason)


class JobsFailed(RuntimeError):
    """Jobs of an experiment failed; the same command tries them again. The shell exits with 1."""


class TrainingDiverged(RuntimeError):
    """A loss or gradient stopped being finite: the weights were left as they were. The shell exits with 1."""

    def __init__(self, report: dict[str, Any], setting: str = "ppo.lr") -> None:
        self.report = report
        super().__init__(
            f"step {report['step']}: the loss or a gradient is not finite; the weights of the last finished optimizer step "
            f"are kept. Lower {setting}, or look at the report for the parameters and metrics involved"
        )
