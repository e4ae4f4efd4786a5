"""Rewards: who scores a response, how word labels reach its tokens, and what each token is paid."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tppo_fast.rewards.alignment import token_spans
from tppo_fast.rewards.labels import CLASS_NAMES, Labeller, Labels
from tppo_fast.rewards.lexical import LexicalLabeller

if TYPE_CHECKING:
    from tppo_fast.rewards.base import TokenRewards, build_reward, label_with
    from tppo_fast.rewards.values import ClassProbabilities

__all__ = [
    "CLASS_NAMES",
    "ClassProbabilities",
    "Labeller",
    "Labels",
    "LexicalLabeller",
    "TokenRewards",
    "build_reward",
    "label_with",
    "token_spans",
]

_WITH_TORCH = {
    "ClassProbabilities": "values",
    "TokenRewards": "base",
    "build_reward": "base",
    "label_with": "base",
}


def __getattr__(name: str) -> Any:
    """Import on first use what needs torch, so that labelling without a model starts at once."""
    if name in _WITH_TORCH:
        return getattr(importlib.import_module(f"tppo_fast.rewards.{_WITH_TORCH[name]}"), name)
    raise AttributeError(f"module 'tppo_fast.rewards' has no attribute {name!r}")
