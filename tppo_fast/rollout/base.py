"""The protocol every rollout engine follows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from tppo_fast.data_types import Prompt, Rollout
from tppo_fast.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample. Only the full distribution at a temperature: anything narrower biases the PPO ratio."""

    n: int = 1
    """Responses per prompt."""
    max_new_tokens: int
    """Longest response."""
    temperature: float = 1.0
    """Logits are divided by it, above 0; log-probabilities are taken at it."""
    greedy: bool = False
    """Take the most likely token (evaluation only), at temperature 1; log-probabilities are still those of the distribution."""
    top_p: float = 1.0
    """Must be 1."""
    top_k: int = 0
    """Must be 0 (off)."""
    seed: int = 0
    """Same weights, prompts, parameters and seed give the same responses."""

    def __post_init__(self) -> None:
        if self.top_p < 1.0 or self.top_k > 0:
            raise UserError(
                f"top_p = {self.top_p}, top_k = {self.top_k}: log-probabilities of a truncated distribution would bias the "
                "PPO ratio; use top_p = 1.0 and top_k = 0"
            )
        if not self.temperature > 0.0 or self.n < 1 or self.max_new_tokens < 1:
            raise UserError(
                f"temperature = {self.temperature}, n = {self.n}, max_new_tokens = {self.max_new_tokens}: all must be "
                "above 0 (for greedy decoding set greedy = True)"
            )
        if self.greedy and self.temperature != 1.0:
            raise UserError(
                f"temperature = {self.temperature} with greedy = True: the most likely token has no temperature, and its "
                "log-probability is taken at 1; set temperature = 1.0"
            )


class RolloutEngine(Protocol):
    """Samples responses from a copy of the policy's weights."""

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """``len(prompts) * sampling.n`` rollouts, the n of one prompt next to each other, in the prompts' order.

        Raises:
            UserError: no weights were loaded yet, a prompt is too long, or the parameters cannot be honoured exactly.
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace every weight; rollouts carry ``version`` from now on.

        Raises:
            UserError: a name or shape does not fit, or a weight of the engine is missing from ``weights``.
        """
        ...

    def sleep(self) -> None:
        """Free what can be freed until the next ``load_weights``; called only where ``vllm.sleep`` asks for it."""
        ...

    def close(self) -> None:
        """Release memory and processes; safe to call twice."""
        ...


# -------------------------------------------------------------------- what every engine checks alike


def loaded(version: int | None) -> int:
    """The version of the loaded weights; UserError where there are none."""
    if version is None:
        raise UserError("generate was called before load_weights: publish the policy first")
    return version


def answered(
    prompt: Prompt,
    tokens: Sequence[int],
    logprobs: Sequence[float],
    *,
    decode: Callable[[Sequence[int]], str],
    stop: Collection[int],
    version: int,
) -> Rollout:
    """The rollout of one answer, which ends with the first of the ``stop`` tokens, if there is one."""
    length = next((i + 1 for i, token in enumerate(tokens) if token in stop), len(tokens))
    kept = list(tokens[:length])
    return Rollout(
        prompt=prompt,
        token_ids=kept,
        logprobs=list(logprobs[:length]),
        text=decode(kept),
        finish_reason="stop" if kept and kept[-1] in stop else "length",
        policy_version=version,
    )


def to_row(rollout: Rollout) -> dict[str, Any]:
    """A rollout as JSON values, but for its prompt: ``Rollout(prompt=..., **row)`` is it again."""
    names = ("token_ids", "logprobs", "text", "finish_reason", "policy_version")
    return {name: getattr(rollout, name) for name in names}


def decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """How engines turn tokens into text: as they are, without special tokens."""
    return functools.partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def max_positions(model_config: Any) -> int | None:
    """The longest sequence that a model of this transformers config can read, None where it names no limit."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None)


def check_lengths(longest: int, model_config: Any, budget: tuple[str, int] | None = None) -> None:
    """Refuse a prompt with its response, ``longest`` tokens, that the model or the ``budget`` (setting, tokens) cannot hold."""
    positions = max_positions(model_config)
    if positions is not None and longest > positions:
        raise UserError(
            f"a prompt with its response may need {longest} positions, the model has {positions}: shorten prompts "
            "(data.max_prompt_tokens) or responses (rollout.max_new_tokens)"
        )
    if budget is not None and longest > budget[1]:
        raise UserError(
            f"{budget[0]} = {budget[1]}: a prompt with its response may need {longest} tokens; raise it, or "
            "shorten prompts (data.max_prompt_tokens) or responses (rollout.max_new_tokens)"
        )


def stop_tokens(generation: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a response: the tokenizer's, and those of the model's generation config."""
    own = generation.eos_token_id
    more: list[int] = own if isinstance(own, list) else [] if own is None else [own]
    return sorted({tokenizer.eos_token_id, *more})


def fitting(weights: Iterable[tuple[str, Tensor]], shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Tensor]]:
    """The weights as they come.

    Raises:
        UserError: naming the first weight of another name or shape or, at the end, the first that did not come.
    """
    missing = dict(shapes)
    for name, tensor in weights:
        if name not in shapes or tuple(shapes[name]) != tuple(tensor.shape):
            shape = tuple(shapes[name]) if name in shapes else "no such weight"
            raise UserError(
                f"weight {name!r} of shape {tuple(tensor.shape)}: the engine has {shape}; load the same model"
            )
        missing.pop(name, None)
        yield name, tensor
    if missing:
        raise UserError(f"weight {min(missing)!r} was not published ({len(missing)} missing): publish the whole policy")
