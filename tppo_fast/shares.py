"""Sampling, and scoring by a reward model, shared out by the leader: each process takes a run of the prompts or responses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, TypeVar

from tppo_fast import seeding
from tppo_fast.data_types import Prompt, Rollout
from tppo_fast.errors import ProcessFailed, UserError
from tppo_fast.leader import LEARN, SAMPLE, Leader
from tppo_fast.rewards import ClassProbabilities
from tppo_fast.rollout import RolloutEngine, SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

    from tppo_fast.rewards.model_source import ModelReward

T = TypeVar("T")


class SharedEngine:
    """A ``RolloutEngine`` of every process's own."""

    def __init__(self, own: RolloutEngine, leader: Leader) -> None:
        self._own, self._leader = own, leader

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        shares = split(prompts, self._leader.size)
        others = [rank for rank in range(1, len(shares)) if shares[rank]]
        for rank in others:
            own = replace(sampling, seed=seeding.derive(sampling.seed, "process", rank))
            sent = [asdict(prompt) for prompt in shares[rank]]
            self._leader.ask(rank, SAMPLE, "generate", prompts=sent, sampling=asdict(own))
        rollouts = self._own.generate(shares[0], sampling) if shares[0] else []
        for rank in others:
            rows, _ = self._leader.answer(rank, SAMPLE, "generate")
            repeated = (prompt for prompt in shares[rank] for _ in range(sampling.n))
            rollouts += [Rollout(prompt=prompt, **row) for prompt, row in zip(repeated, rows, strict=True)]
        return rollouts

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        with self._leader.all(SAMPLE, "load_weights", version=version):
            self._own.load_weights(weights, version)

    def sleep(self) -> None:
        with self._leader.all(SAMPLE, "sleep"):
            self._own.sleep()

    def close(self) -> None:
        with contextlib.suppress(ProcessFailed, UserError), self._leader.all(SAMPLE, "close"):
            pass
        self._own.close()


class SharedScores:
    """A ``RewardFunction``: the reward model of every process's own."""

    def __init__(self, own: ModelReward, leader: Leader) -> None:
        self._own, self._leader = own, leader

    def __call__(self, rollouts: Sequence[Rollout], /) -> list[ClassProbabilities]:
        shares = split([(tuple(r.prompt.history), r.text) for r in rollouts], self._leader.size)
        others = [rank for rank in range(1, len(shares)) if shares[rank]]
        for rank in others:
            self._leader.ask(rank, LEARN, "score", contents=shares[rank])
        scores = self._own.score(shares[0])
        for rank in others:
            spans, values = self._leader.answer(rank, LEARN, "score")
            pairs = ((values[str(i)], [(begin, end) for begin, end in own]) for i, own in enumerate(spans))
            scores += [ClassProbabilities(values=v, spans=s) for v, s in pairs]
        return scores


def split(items: Sequence[T], parts: int) -> list[Sequence[T]]:
    """Runs of nearly equal length, in order; the first ones are the shorter."""
    ends = [len(items) * (part + 1) // parts for part in range(parts)]
    return [items[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
