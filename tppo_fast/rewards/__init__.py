"""Rewards: who scores a response, how word labels reach its tokens, and what each token is paid."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tppo_fast.plugins import load_object
from tppo_fast.rewards.alignment import project, token_spans
from tppo_fast.rewards.labels import CLASS_NAMES, Labeller, Labels
from tppo_fast.rewards.lexical import LexicalLabeller
from tppo_fast.rewards.transfer import transfer
from tppo_fast.words import normalise_query

if TYPE_CHECKING:
    from tppo_fast.rewards.base import RewardFunction, TokenRewards, build_reward, label_with
    from tppo_fast.rewards.display import examples_table
    from tppo_fast.rewards.length_penalty import lwp
    from tppo_fast.rewards.values import ClassProbabilities

__all__ = [
    "CLASS_NAMES",
    "ClassProbabilities",
    "Labeller",
    "Labels",
    "LexicalLabeller",
    "RewardFunction",
    "TokenRewards",
    "build_reward",
    "examples_table",
    "label_with",
    "load_object",
    "lwp",
    "normalise_query",
    "project",
    "token_spans",
    "transfer",
]

_WITH_TORCH = {
    "ClassProbabilities": "values",
    "RewardFunction": "base",
    "TokenRewards": "base",
    "build_reward": "base",
    "examples_table": "display",
    "label_with": "base",
    "lwp": "length_penalty",
}


def __getattr__(name: str) -> Any:
    """Import on first use what needs torch, so that labelling without a model starts at once."""
    if name in _WITH_TORCH:
        return getattr(importlib.import_module(f"tppo_fast.rewards.{_WITH_TORCH[name]}"), name)
    raise AttributeError(f"module 'tppo_fast.rewards' has no attribute {name!r}")
