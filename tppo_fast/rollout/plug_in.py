"""A user's engine: what it raises and what it answers, checked in the one place that every rollout of it passes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from tppo_fast.data_types import Prompt, Rollout
from tppo_fast.errors import UserError
from tppo_fast.plugins import guarded
from tppo_fast.rollout.base import SamplingParams


class PlugIn:
    """The engine that ``rollout.engine = "module:function"`` made; its failures name the setting."""

    def __init__(self, engine: Any, field: str, vocabulary: int) -> None:
        for name in ("generate", "load_weights", "close"):
            if not callable(getattr(engine, name, None)):
                raise UserError(
                    f"{field} returned a {type(engine).__name__} without a method {name}: see RolloutEngine"
                )
        self._field, self._vocabulary = field, vocabulary
        self._version: int | None = None
        self._generate = guarded(engine.generate, field)
        self._load_weights = guarded(engine.load_weights, field)
        self.sleep = guarded(getattr(engine, "sleep", lambda: None), field)  # only where vllm.sleep asks for it
        self.close = guarded(engine.close, field)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._load_weights(weights, version)
        self._version = version

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """What the engine samples.

        Raises:
            UserError: it is not what was asked for, or a field of a rollout is not what ``Rollout`` says.
        """
        answer: Any = self._generate(tuple(prompts), sampling)
        if not isinstance(answer, Sequence) or not all(isinstance(r, Rollout) for r in answer):
            raise UserError(f"{self._field}: generate returned a {type(answer).__name__}: give a list of Rollouts")
        asked = [p for p in prompts for _ in range(sampling.n)]
        if [r.prompt for r in answer] != asked:
            raise UserError(
                f"{self._field} answered {len(prompts)} prompts with {len(answer)} rollouts that are not {sampling.n} of each, "
                "in the prompts' order: see RolloutEngine.generate"
            )
        return [self._checked(i, *pair, sampling) for i, pair in enumerate(zip(answer, asked, strict=True))]

    def _checked(self, i: int, rollout: Rollout, prompt: Prompt, sampling: SamplingParams) -> Rollout:
        ids, logprobs = _numbers(rollout.token_ids, operator.index), _numbers(rollout.logprobs, float)
        wrong = None
        if ids is None:
            wrong = "token_ids that are no list of integers"
        elif not 1 <= len(ids) <= sampling.max_new_tokens:
            wrong = f"{len(ids)} tokens, and between 1 and max_new_tokens = {sampling.max_new_tokens} were asked for"
        elif not all(0 <= t < self._vocabulary for t in ids):
            wrong = f"a token outside the vocabulary of {self._vocabulary}"
        elif logprobs is None or len(logprobs) != len(ids) or not all(map(math.isfinite, logprobs)):
            wrong = f"logprobs that are not {len(ids)} finite numbers, one for each token"
        elif not isinstance(rollout.text, str):
            wrong = f"text = {rollout.text!r}, which is no text"
        elif rollout.finish_reason not in ("stop", "length"):
            wrong = f'finish_reason = {rollout.finish_reason!r}, and there are "stop" and "length"'
        elif rollout.policy_version != self._version:
            wrong = f"policy_version = {rollout.policy_version!r}, and load_weights was given {self._version}"
        if wrong:
            raise UserError(f"{self._field}: rollout {i} has {wrong}: see tppo_fast.data_types.Rollout")
        return replace(rollout, prompt=prompt, token_ids=ids, logprobs=logprobs)


def _numbers(values: Any, kind: Callable[[Any], Any]) -> list[Any] | None:
    """A list, tensor or array as a list of Python's own numbers, or None."""
    try:
        return [kind(value) for value in (values.tolist() if hasattr(values, "tolist") else values)]
    except (TypeError, ValueError):
        return None
