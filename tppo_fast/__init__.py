"""Token-level PPO: a dense reward for every generated token, a token critic, and a lean packed loop."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = [
    "Config",
    "EngineError",
    "Interrupted",
    "ProcessFailed",
    "TrainResult",
    "TrainingDiverged",
    "UserError",
    "generate",
    "train",
]
__version__ = "0.1.0"

if TYPE_CHECKING:
    from tppo_fast.config import Config
    from tppo_fast.errors import EngineError, ProcessFailed, TrainingDiverged, UserError
    from tppo_fast.generation import generate
    from tppo_fast.interrupt import Interrupted
    from tppo_fast.trainer import TrainResult, train

_HOME = {
    "Config": "config",
    "generate": "generation",
    "Interrupted": "interrupt",
    "TrainResult": "trainer",
    "train": "trainer",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``import tppo_fast`` and ``--help`` need no torch."""
    if name not in __all__:
        raise AttributeError(f"module 'tppo_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tppo_fast.{_HOME.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
