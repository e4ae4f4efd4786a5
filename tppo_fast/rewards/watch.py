"""A watch over a run: it warns when a policy games its reward or a critic does not learn, once per kind, in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from tppo_fast.data_types import Rollout
from tppo_fast.words import normalise_query, queries_of

REFERENCE_STEPS = 5
"""The first steps of a run, whose means the later ones are compared with."""
RECENT_STEPS = 5
"""The newest steps, whose means are compared."""
LENGTH_RATIO = 1.5
SHARE_GAIN = 0.15
SPELLING_LOSS = 0.1
KL_LIMIT = 0.5
RELEVANCE_LOSS = 0.03
CRITIC_STEPS = 20
"""Steps after which a critic should know half of the mean return."""

Row = Mapping[str, float | None]


def rollout_metrics(
    rollouts: Sequence[Rollout], rewards: Sequence[torch.Tensor], classes: Sequence[Sequence[int]] | None
) -> dict[str, float]:
    """What was sampled and how it was rewarded; ``classes`` are the tokens', where the reward judges them."""
    per_response = torch.stack([r.sum() for r in rewards])
    tokens = sum(len(r) for r in rewards)
    metrics = {
        "rollout/reward_mean": float(per_response.mean()),
        "rollout/reward_std": float(per_response.std(correction=0)),
        "rollout/reward_per_token": float(per_response.sum()) / tokens,
        "rollout/length_mean": tokens / len(rewards),
        "rollout/truncated_share": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
        "rollout/tokens": float(tokens),
    }
    if classes is not None:
        flat = [c for row in classes for c in row if c]
        common = torch.tensor([sum((c == 2) - (c == 1) for c in row) for row in classes], dtype=torch.float32)
        metrics["rollout/token_reward_mean"] = float(common.mean())
        metrics["rollout/token_reward_std"] = float(common.std(correction=0))
        metrics["rollout/relevant_share"] = sum(c == 2 for c in flat) / max(len(flat), 1)
    return metrics


def repetition_and_copies(rollouts: Sequence[Rollout], separator: str) -> dict[str, float]:
    """Means over responses of the share of queries that repeat an earlier one, and that stand in the history.

    Args:
        rollouts: the step's responses.
        separator: text between the queries of a response.
    """
    repeated, copied = [], []
    for rollout in rollouts:
        forms = [form for form in map(normalise_query, queries_of(rollout.text, separator)) if form]
        history = {normalise_query(query) for query in rollout.prompt.history}
        count = max(len(forms), 1)
        repeated.append((len(forms) - len(set(forms))) / count)
        copied.append(sum(form in history for form in forms) / count)
    return {"rollout/repeated_share": fmean(repeated), "rollout/copied_share": fmean(copied)}


def canonical_share(rollouts: Sequence[Rollout], tokenizer: Any) -> dict[str, float]:
    """Tokens that the tokenizer needs for the step's texts, divided by those sampled for them; special tokens do not count."""
    special = set(tokenizer.all_special_ids)
    sampled = sum(i not in special for rollout in rollouts for i in rollout.token_ids)
    texts = [rollout.text for rollout in rollouts]
    needed = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return {"rollout/canonical_share": sum(map(len, needed)) / sampled if sampled else 1.0}


class RunWatch:
    """Compares the newest steps with the run's first ones.

    It warns when responses have become ``LENGTH_RATIO`` times as long; repeat or copy ``SHARE_GAIN`` more of their queries;
    spell their texts in more tokens than the tokenizer needs, by ``SPELLING_LOSS`` of ``rollout/canonical_share``; are further
    than ``KL_LIMIT`` nats per token from the reference policy; or earn more while the held-out relevance
    (``eval/relevance``) or the lexical judge's (``eval/word_relevance``) has fallen by ``RELEVANCE_LOSS``. And it warns when
    after ``CRITIC_STEPS`` the critic's values are still nearer to 0 than to the returns.
    """

    def __init__(self, rows: Sequence[Row] = ()) -> None:
        """``rows`` are those that an interrupted run has logged: the resumed one warns as if it had never stopped."""
        self._steps: list[Row] = []
        self._looks: list[Row] = []
        self._warned: set[str] = set()
        for row in rows:
            self(row)

    def __call__(self, row: Row) -> list[str]:
        """The sentences that this step's metrics give cause for, each kind once in the run."""
        if "eval/relevance" in row:
            self._looks.append(row)
        if "rollout/reward_mean" in row:
            self._steps.append(row)
        found = {kind: said for kind, said in self._findings().items() if kind not in self._warned}
        self._warned |= found.keys()
        return list(found.values())

    def _findings(self) -> dict[str, str]:
        found: dict[str, str] = {}
        if len(self._steps) < REFERENCE_STEPS + RECENT_STEPS:
            return found
        length, was = self._mean("rollout/length_mean")
        if length > LENGTH_RATIO * was:
            found["length"] = (
                f"responses have grown from {was:.1f} to {length:.1f} tokens: does the reward pay for length?"
            )
        for kind, name, remedy in (
            ("repetition", "rollout/repeated_share", "repeat an earlier one"),
            ("copies", "rollout/copied_share", "stand in the history"),
        ):
            share, was = self._mean(name)
            if share > was + SHARE_GAIN:
                found[kind] = f"{share:.0%} of the queries {remedy}, {was:.0%} at first: does the reward pay for that?"
        needed, was = self._mean("rollout/canonical_share")
        if needed < was - SPELLING_LOSS:
            found["spelling"] = (
                f"the responses' texts need {needed:.0%} of the tokens they were sampled in, {was:.0%} at first: if the reward "
                'pays for each token, set reward.per = "word"'
            )
        kl, _ = self._mean("ppo/kl")
        if kl > KL_LIMIT:
            found["kl"] = f"the policy is {kl:.2f} nats per token from the reference: raise ppo.kl_coef or lower ppo.lr"
        value, target = self._mean("ppo/value_mean")[0], self._mean("ppo/return_mean")[0]
        if len(self._steps) >= CRITIC_STEPS and abs(target - value) > max(abs(target) / 2, 0.1):
            found["critic"] = (
                f"the critic predicts {value:.3g} where returns are {target:.3g}: raise ppo.critic_lr, or start with "
                "ppo.value_warmup_steps"
            )
        reward, was = self._mean("rollout/reward_mean")
        for name, judge in (
            ("eval/relevance", "held-out relevance"),
            ("eval/word_relevance", "the lexical judge's share"),
        ):
            if reward > was and (fell := self._fall(name)) > RELEVANCE_LOSS:
                found[name] = (
                    f"the reward rises ({was:.3f} to {reward:.3f}) while {judge} has fallen by {fell:.3f}: it is hacked"
                )
        return found

    def _mean(self, name: str) -> tuple[float, float]:
        """(newest, first) means of a metric; NaN, which no comparison is true of, where it was not logged."""
        newest, first = (
            [v for row in rows if (v := row.get(name)) is not None]
            for rows in (self._steps[-RECENT_STEPS:], self._steps[:REFERENCE_STEPS])
        )
        return (fmean(newest), fmean(first)) if newest and first else (float("nan"), float("nan"))

    def _fall(self, name: str) -> float:
        """How far the newest look is below the first one."""
        values = [v for row in self._looks if (v := row.get(name)) is not None]
        return values[0] - values[-1] if len(values) > 1 else 0.0
