"""How far two labellers agree on the same responses: share and Cohen's kappa, with bootstrap intervals over users.

Words are compared where both labelled the same responses; B's classes are projected onto A's words by characters, so that a
person may cut words differently. Kappa (Cohen 1960) is ``(p_o - p_e) / (1 - p_e)``: agreement beyond what the two labellers'
own rates would give by chance. It is 0 where one of them never varies, and NaN where both always give one and the same label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from tppo_fast.data.rows import show
from tppo_fast.errors import UserError
from tppo_fast.estimates import Estimate, bootstrap_users
from tppo_fast.labelling.records import LabelledResponse
from tppo_fast.rewards.alignment import project
from tppo_fast.rewards.labels import IRRELEVANT, RELEVANT

PAPER = {"word": 0.9118, "sentence": 0.8095}
"""LLaMA-3-70B against people, 60 examples (TPPO, section 4)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How two labellers agree at one level."""

    level: str
    """"word" or "sentence"."""
    count: int
    """Words, or responses, compared."""
    relevant: tuple[float, float]
    """The share that A and that B call relevant."""
    agreement: Estimate
    """Share of equal labels."""
    kappa: Estimate
    """Cohen's kappa."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two label files compared."""

    labellers: tuple[str, str]
    """Who labelled A and B."""
    responses: int
    """Distinct responses in both."""
    only: tuple[int, int]
    """Distinct responses in A alone and in B alone."""
    users: int
    """Users among the compared responses: what the bootstrap resamples."""
    dropped: int
    """Words of A in responses of both that B left unlabelled."""
    levels: list[Agreement]
    """Words, then sentences."""

    def as_json(self) -> dict[str, Any]:
        """Plain values, NaN as null."""
        return {
            "labellers": list(self.labellers),
            "responses": self.responses,
            "only_in_one": list(self.only),
            "users": self.users,
            "words_not_in_b": self.dropped,
            **{
                level.level: {
                    "count": level.count,
                    "relevant": list(level.relevant),
                    "agreement": _plain(level.agreement),
                    "kappa": _plain(level.kappa),
                    "paper_agreement_with_people": PAPER[level.level],
                }
                for level in self.levels
            },
        }

    def table(self) -> Table:
        """For people; the paper's figures against people stand below, for reference."""
        table = Table(title=escape(f"A = {self.labellers[0]}, B = {self.labellers[1]}"))
        table.add_column("level")
        for name in ("n", "A relevant", "B relevant", "agreement", "Cohen's kappa"):
            table.add_column(name, justify="right")
        for level in self.levels:
            rates = [f"{rate:.1%}" for rate in level.relevant]
            table.add_row(level.level, str(level.count), *rates, f"{level.agreement:.1%}", f"{level.kappa:.3f}")
        for name, value in PAPER.items():
            table.add_row(f"paper, {name}, LLM and people", "", "", "", f"{value:.2%}", "", style="dim")
        table.caption = (
            f"{self.responses} responses of {self.users} users in both files, {self.only[0]} only in A, {self.only[1]} only in "
            f"B; {self.dropped} words of A have no label in B; 95 % intervals by bootstrap over users"
        )
        return table


def compare(a: Sequence[LabelledResponse], b: Sequence[LabelledResponse], *, seed: int = 0) -> Comparison:
    """Compare two labellers on the responses that both labelled, each distinct one once.

    Raises:
        UserError: no response is in both, or one is labelled twice and differently in a file.
    """
    left, right = _by_response(a), _by_response(b)
    shared = [key for key in left if key in right]
    if not shared:
        raise UserError("--agreement: no response is in both files: label the same responses with both labellers")
    users = sorted({left[key].user_id for key in shared})
    place = {user: index for index, user in enumerate(users)}
    words, sentences = np.zeros((2, len(users), 2, 2))  # [U, A's label, B's label] counts
    dropped = 0
    for key in shared:
        one, two = left[key], right[key]
        user = place[one.user_id]
        sentences[user, one.labels.sentence, two.labels.sentence] += 1
        projected = project(two.labels, one.labels.spans)
        for mine, theirs in zip(one.labels.classes, projected, strict=True):
            if mine in (IRRELEVANT, RELEVANT) and theirs in (IRRELEVANT, RELEVANT):
                words[user, mine - 1, theirs - 1] += 1
            else:
                dropped += mine in (IRRELEVANT, RELEVANT)
    levels = [_level(name, counts, seed) for name, counts in (("word", words), ("sentence", sentences))]
    return Comparison(
        labellers=(_labellers(left), _labellers(right)),
        responses=len(shared),
        only=(len(left) - len(shared), len(right) - len(shared)),
        users=len(users),
        dropped=dropped,
        levels=levels,
    )


def _by_response(labels: Sequence[LabelledResponse]) -> dict[tuple[Any, ...], LabelledResponse]:
    found: dict[tuple[Any, ...], LabelledResponse] = {}
    for label in labels:
        other = found.setdefault(_key(label), label)
        if (other.labels, other.labeller) != (label.labels, label.labeller):
            raise UserError(
                f"--agreement: {show(label.response)} of user {show(label.user_id)} is labelled twice in one file, by "
                f"{other.labeller} and {label.labeller}: keep one labeller's rows"
            )
    return found


def _labellers(labels: Mapping[tuple[Any, ...], LabelledResponse]) -> str:
    return ", ".join(sorted({label.labeller for label in labels.values()}))


def _level(name: str, counts: np.ndarray, seed: int) -> Agreement:
    def figures(weights: np.ndarray) -> dict[str, float]:
        return {"agreement": _share(total := np.tensordot(weights, counts, 1)), "kappa": _kappa(total)}

    total = counts.sum(0)
    n = total.sum()
    return Agreement(
        level=name,
        count=int(n),
        relevant=(float(total[1].sum() / n), float(total[:, 1].sum() / n)) if n else (np.nan, np.nan),
        **bootstrap_users(figures, len(counts), seed=seed, resamples=2000),
    )


def _share(counts: np.ndarray) -> float:
    """The share on the diagonal of [2, 2] counts, NaN where nothing was counted."""
    total = counts.sum()
    return float(np.trace(counts) / total) if total else np.nan


def _kappa(counts: np.ndarray) -> float:
    """Cohen's kappa of [2, 2] counts."""
    total = counts.sum()
    chance = float(counts.sum(1) @ counts.sum(0) / total**2) if total else 1.0
    return (_share(counts) - chance) / (1.0 - chance) if chance < 1.0 else np.nan


def _plain(estimate: Estimate) -> dict[str, float | None]:
    values = {"value": estimate.mean, "low": estimate.low, "high": estimate.high}
    return {name: value if np.isfinite(value) else None for name, value in values.items()}


def _key(label: LabelledResponse) -> tuple[Any, ...]:
    history = tuple((kind, tuple(entries)) for kind, entries in sorted(label.history.items()))
    return label.user_id, history, tuple(label.next_queries), label.response
