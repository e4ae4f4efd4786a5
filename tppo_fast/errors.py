"""The two ways a run can end badly, each with one sentence for the person who started it."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input or usage: the message names the field, its value and the remedy. The shell exits with 2."""


class TrainingDiverged(RuntimeError):
    """A loss or gradient stopped being finite: the weights were left as they were. The shell exits with 1."""
