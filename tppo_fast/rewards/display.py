"""A table in which a person can check that the labels sit on the right tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from tppo_fast.data_types import Rollout
from tppo_fast.rewards.alignment import token_spans
from tppo_fast.rewards.labels import CLASS_NAMES
from tppo_fast.rewards.values import SCALES

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_STYLES = ("dim", "red", "green")


def examples_table(
    rollouts: Sequence[Rollout],
    classes: Sequence[Sequence[int]] | None,
    rewards: Sequence[Tensor],
    tokenizer: PreTrainedTokenizerBase,
    scale: str,
) -> Table:
    """Per response: the history and the true next queries, then one row per token with its class and reward.

    Args:
        rollouts: the examples.
        classes: from ``TokenRewards.explain``; None where the source has no labels.
        rewards: from ``TokenRewards``, one [length] tensor per rollout.
        tokenizer: the policy's.
        scale: ``reward.scale``, by which labels were paid.
    """
    _, poor, good = SCALES[scale]
    paid = f': reward.scale = "{scale}" pays {poor:g} if irrelevant, {good:g} if relevant'
    table = Table(title="Reward of each token" + ("" if classes is None else paid))
    table.add_column("response", justify="right")
    table.add_column("position", justify="right")
    table.add_column("token")
    table.add_column("class")
    table.add_column("reward", justify="right")
    for index, (rollout, values) in enumerate(zip(rollouts, rewards, strict=True)):
        for name, queries in (("history", rollout.prompt.history), ("true next", rollout.prompt.next_queries)):
            table.add_row(str(index + 1), "", Text(f"{name}: {' | '.join(queries)}", style="italic"), "", "")
        tokens = _tokens(rollout, tokenizer)
        kinds = [None] * len(tokens) if classes is None else classes[index]
        for position, (token, kind, value) in enumerate(zip(tokens, kinds, values.tolist(), strict=True), start=1):
            name = Text("-") if kind is None else Text(CLASS_NAMES[kind], style=_STYLES[kind])
            table.add_row("", str(position), Text(token), name, f"{value:+.3f}")
        table.add_section()
    return table


def _tokens(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Each token's characters in quotes, so that spaces show; tokens without any by their name in the vocabulary."""
    text, spans = token_spans(tokenizer, rollout.token_ids)
    names = tokenizer.convert_ids_to_tokens([int(i) for i in rollout.token_ids])
    return [repr(text[s:e]) if e > s else str(name) for (s, e), name in zip(spans, names, strict=True)]
