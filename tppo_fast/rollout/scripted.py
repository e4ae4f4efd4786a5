"""A rollout engine that replays given responses: the offline double for tests and for training on logged data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from tppo_fast.data_types import Prompt, Rollout
from tppo_fast.errors import UserError
from tppo_fast.rollout.base import SamplingParams

Script = Callable[[Prompt, int], tuple[Sequence[int], Sequence[float]]]
"""(prompt, sample index) -> (token ids, log-probabilities)."""


class ScriptedEngine:
    """Answers with what ``script`` says, cut at max_new_tokens like any engine."""

    def __init__(self, script: Script, *, decode: Callable[[Sequence[int]], str], eos_token_ids: Sequence[int]) -> None:
        self._script = script
        self._decode = decode
        self._eos = frozenset(eos_token_ids)
        self._version: int | None = None
        self.weights: dict[str, Tensor] = {}

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        if self._version is None:
            raise UserError("generate was called before load_weights: publish the policy first")
        return [self._rollout(prompt, i, sampling) for prompt in prompts for i in range(sampling.n)]

    def _rollout(self, prompt: Prompt, index: int, sampling: SamplingParams) -> Rollout:
        tokens, logprobs = self._script(prompt, index)
        length = next((i + 1 for i, t in enumerate(tokens) if t in self._eos), len(tokens))
        length = min(length, sampling.max_new_tokens)
        tokens, logprobs = list(tokens[:length]), list(logprobs[:length])
        return Rollout(
            prompt=prompt,
            token_ids=tokens,
            logprobs=logprobs,
            text=self._decode(tokens),
            finish_reason="stop" if tokens and tokens[-1] in self._eos else "length",
            policy_version=self._version or 0,
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        given = {name: tensor.clone() for name, tensor in weights}
        if not given:
            raise UserError("load_weights got no weights: pass the policy's named_weights()")
        if self.weights and given.keys() != self.weights.keys():
            odd = sorted(given.keys() ^ self.weights.keys())[0]
            raise UserError(f"weight {odd!r}: the names differ from the first load_weights; publish the whole policy")
        self.weights, self._version = given, version

    def sleep(self) -> None:
        """There is nothing to free."""

    def close(self) -> None:
        self.weights = {}
