"""Token-level PPO: a dense reward for every generated token, a token critic, and a lean packed loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Config", "train"]
__version__ = "0.1.0"

if TYPE_CHECKING:
    from tppo_fast.config import Config
    from tppo_fast.trainer import train


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``import tppo_fast`` and ``--help`` need no torch."""
    if name == "Config":
        from tppo_fast.config import Config

        return Config
    if name == "train":
        from tppo_fast.trainer import train

        return train
    raise AttributeError(f"module 'tppo_fast' has no attribute {name!r}")
