"""Labelled responses -> tensors in the reward model's tokens, split by user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tppo_fast import seeding
from tppo_fast.data.rows import searched
from tppo_fast.data.sessions import split_by_user
from tppo_fast.errors import UserError
from tppo_fast.labelling.records import LabelledResponse
from tppo_fast.reward_model.settings import LabelsConfig
from tppo_fast.rewards.alignment import project
from tppo_fast.rewards.labels import IRRELEVANT, RELEVANT, Labels
from tppo_fast.rewards.token_model import Encoded, Reader
from tppo_fast.words import stem, word_spans

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One labelled response of K tokens."""

    row: LabelledResponse
    """What was labelled."""
    encoded: Encoded
    """History and response in the reward model's tokens."""
    labels: Int[Tensor, " K"]
    """The class of each response token: that of its word."""
    copied: Int[Tensor, " K"]
    """What "a word is relevant when it stands in the history" says: the baseline's class of each token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Rows of three disjoint groups of users."""

    train: list[LabelledResponse]
    validation: list[LabelledResponse]
    """Decides when to stop."""
    test: list[LabelledResponse]
    """Measured once, at the end."""


def split(rows: Sequence[LabelledResponse], config: LabelsConfig, seed: int) -> Parts:
    """Training, validation and test rows; no user stands in two parts.

    Raises:
        UserError: fewer than three users.
    """
    if (users := len({row.user_id for row in rows})) < 3:
        raise UserError(
            f"data.labels = {config.labels!r} has {users} users: training, validation and test need at least 3"
        )
    # seeds of their own: the rows may be the training side of a split by ``seed``, which holds none of its held-out users
    test_seed, validation_seed = (seeding.derive(seed, "reward model", part) for part in ("test", "validation"))
    rest, test = split_by_user(rows, config.test_fraction, test_seed)
    train, validation = split_by_user(rest, config.validation_fraction / (1.0 - config.test_fraction), validation_seed)
    return Parts(train=train, validation=validation, test=test)


def encode(rows: Sequence[LabelledResponse], reader: Reader) -> list[Example]:
    """Every response with at least one token, with the labels of its words on its tokens."""
    encoded = reader([searched(row.history) for row in rows], [row.response for row in rows])
    examples = []
    for row, one in zip(rows, encoded, strict=True):
        if one.response:
            copied = project(_found_in_history(row), one.spans)
            labels = torch.tensor(project(row.labels, one.spans))
            examples.append(Example(row=row, encoded=one, labels=labels, copied=torch.tensor(copied)))
    return examples


def _found_in_history(row: LabelledResponse) -> Labels:
    """Each word of the response: relevant when its stem stands in the history."""
    known = {stem(query[a:b]) for query in searched(row.history) for a, b in word_spans(query)}
    spans = word_spans(row.response)
    classes = [RELEVANT if stem(row.response[a:b]) in known else IRRELEVANT for a, b in spans]
    return Labels(spans=spans, classes=classes, sentence=int(RELEVANT in classes))
