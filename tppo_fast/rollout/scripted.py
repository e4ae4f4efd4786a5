"""A rollout engine that replays given responses: the offline double for tests and for training on logged data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from tppo_fast.data_types import Prompt, Rollout
from tppo_fast.errors import UserError
from tppo_fast.rollout.base import SamplingParams, answered, loaded

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
        version, limit = loaded(self._version), sampling.max_new_tokens
        asked = [(prompt, self._script(prompt, i)) for prompt in prompts for i in range(sampling.n)]
        return [
            answered(p, tokens[:limit], logprobs[:limit], decode=self._decode, stop=self._eos, version=version)
            for p, (tokens, logprobs) in asked
        ]

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
