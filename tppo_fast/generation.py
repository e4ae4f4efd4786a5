"""What a trained policy is for: histories in, next queries out. In the shell ``tppo-fast generate``."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tppo_fast.config import LEAST_PROMPT, Config, DataConfig, build
from tppo_fast.data import prompt_file
from tppo_fast.data.prompts import PromptBuilder
from tppo_fast.data.rows import Session, parse_history
from tppo_fast.data_types import Rollout
from tppo_fast.errors import UserError
from tppo_fast.rollout import SamplingParams, build_engine
from tppo_fast.rollout.base import max_positions
from tppo_fast.sections import TEMPLATE
from tppo_fast.seeding import derive
from tppo_fast.words import queries_of

BATCH = 8
"""Sessions in one call of the engine; fixed, since it decides which random numbers a response gets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSettings:
    """What to sample from a policy."""

    policy: Path
    """Folder of a causal LM and its tokenizer."""
    samples: int = 1
    """Responses to each session."""
    max_new_tokens: int = 48
    """Longest response."""
    temperature: float = 1.0
    """Logits are divided by it."""
    greedy: bool = False
    """Take the most likely token each time."""
    seed: int = 0
    """Of the sampling."""
    engine: str = "hf"
    """Rollout engine."""
    template: str = TEMPLATE
    """Prompt text, as the policy was supervised with."""
    separator: str = ", "
    """Text between queries."""
    max_prompt_tokens: int = 512
    """Longest prompt, where the policy has room for it."""


def generate(
    policy: str | Path,
    histories: Sequence[Mapping[str, Sequence[str]]],
    *,
    samples: int = 1,
    max_new_tokens: int = 48,
    temperature: float = 1.0,
    greedy: bool = False,
    seed: int = 0,
    engine: str = "hf",
    prompts: Mapping[str, Any] | None = None,
) -> list[list[list[str]]]:
    """The next queries of a policy: for each history ``samples`` lists of queries.

    Every run leaves a ``prompt.json`` in its policy's folder, which says how prompts are written.

    Args:
        policy: folder of a causal LM (safetensors) and its tokenizer.
        histories: kind of event -> its entries, oldest first: ``{"search": ["lisbon", "lisbon hotels"]}``.
        samples: responses to each history.
        max_new_tokens: longest response.
        temperature: logits are divided by it.
        greedy: take the most likely token each time; then ``samples`` and ``temperature`` are 1.
        seed: equal input and seed give equal output on the same machine.
        engine: who samples: "hf", "vllm" or module:function.
        prompts: ``data`` settings to use instead of those in ``prompt.json``.

    Raises:
        UserError: no such policy, an empty or too long history, or settings that do not fit together.
    """
    sessions = [parse_history({"user_id": "?", "history": h}, f"histories[{i}]") for i, h in enumerate(histories)]
    if prompts is None:
        prompts = prompt_file.read(policy)
    settings = settings_of(
        Path(policy), prompts, samples=samples, max_new_tokens=max_new_tokens, temperature=temperature, greedy=greedy, seed=seed,
        engine=engine,
    )  # fmt: skip
    with contextlib.closing(Sampler(settings, sessions)) as sampler:
        batches = [range(i, min(i + BATCH, len(sessions))) for i in range(0, len(sessions), BATCH)]
        answers = [answer["responses"] for batch in batches for answer in sampler(batch)]
    return [[queries_of(text, settings.separator) for text in texts] for texts in answers]


def settings_of(policy: Path, prompts: Mapping[str, Any], **how: Any) -> SampleSettings:
    """What to sample, with prompts as the ``data`` settings in ``prompts`` have them, the defaults where they say nothing."""
    data = DataConfig(**prompts)
    return SampleSettings(
        policy=policy, template=data.template, separator=data.separator, max_prompt_tokens=data.max_prompt_tokens, **how
    )


class Sampler:
    """Samples one batch of sessions; the engine loads with the first."""

    def __init__(self, settings: SampleSettings, sessions: Sequence[Session]) -> None:
        import torch

        from tppo_fast.loading import load_policy

        self._settings = settings
        if settings.greedy and settings.samples > 1:
            raise UserError(f"samples = {settings.samples} with greedy = True: they would all be the same; ask for one")
        lm, tokenizer = load_policy(str(settings.policy))
        config = _config(settings, max_positions(lm.config))
        longest, left = config.data.max_prompt_tokens, None
        if longest < settings.max_prompt_tokens:
            left = f"and {longest} are left beside --max-new-tokens {settings.max_new_tokens}"
        self._prompts = PromptBuilder(tokenizer, config.data, left).prompts(sessions)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._engine = build_engine(config, tokenizer, device)
        self._engine.load_weights(lm.state_dict().items(), version=0)

    def __call__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        own = self._settings
        sampling = SamplingParams(
            n=own.samples,
            max_new_tokens=own.max_new_tokens,
            temperature=own.temperature,
            greedy=own.greedy,
            seed=derive(own.seed, "label", numbers[0]),
        )
        rollouts: list[Rollout] = self._engine.generate([self._prompts[i] for i in numbers], sampling)
        groups = [rollouts[start : start + own.samples] for start in range(0, len(rollouts), own.samples)]
        return [{"responses": [rollout.text for rollout in group]} for group in groups]

    def close(self) -> None:
        self._engine.close()


def _config(settings: SampleSettings, positions: int | None) -> Config:
    """Prompts as long as ``settings`` has them, or as the model's ``positions`` leave room for."""
    longest = settings.max_prompt_tokens
    if positions is not None and positions - settings.max_new_tokens < longest:
        longest = positions - settings.max_new_tokens
        if longest < LEAST_PROMPT:
            raise UserError(
                f"--max-new-tokens {settings.max_new_tokens}: the policy has {positions} positions; leave {LEAST_PROMPT} or more "
                "of them for the prompt"
            )
    return build(
        {
            "model": {"path": str(settings.policy)},
            "data": {"template": settings.template, "separator": settings.separator, "max_prompt_tokens": longest},
            "rollout": {"engine": settings.engine, "max_new_tokens": settings.max_new_tokens},
        }
    )
