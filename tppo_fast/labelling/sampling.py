"""Responses of a policy to label, sampled once and kept, so that a resumed run labels the same ones."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tppo_fast.config import LEAST_PROMPT, Config, build
from tppo_fast.data.prompts import PromptBuilder
from tppo_fast.data.rows import Session, show
from tppo_fast.data_types import Rollout
from tppo_fast.errors import UserError
from tppo_fast.hashing import sha256_of
from tppo_fast.labelling.journal import Journal, fill, journal_path
from tppo_fast.labelling.records import Response, read_record, read_responses, write_record, write_responses
from tppo_fast.rollout import SamplingParams, build_engine
from tppo_fast.rollout.base import max_positions
from tppo_fast.sections import TEMPLATE, first_change
from tppo_fast.seeding import derive

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


def sampled_responses(
    settings: SampleSettings, sessions: Sequence[Session], sessions_file: Path, out: Path, *, fresh: bool
) -> list[Response]:
    """The responses in ``out``, sampled now where that file does not hold them yet.

    Raises:
        UserError: ``out`` holds responses that were sampled with other settings, or the policy cannot be loaded.
    """
    wanted = {
        "sessions_sha256": sha256_of(sessions_file),
        "policy_sha256": policy_sha256(settings.policy),
        **{name: value for name, value in asdict(settings).items() if name != "policy"},
    }
    if fresh:
        out.unlink(missing_ok=True)
        journal_path(out).unlink(missing_ok=True)
    if out.exists():
        if changed := first_change(read_record(out) or {}, wanted):
            raise UserError(
                f"{show(str(out))} was sampled with another {changed[0]}: use --fresh to sample again, or another --out"
            )
        return read_responses(out, sessions)
    keys = [f"{number}/{hashlib.sha256(repr(wanted).encode()).hexdigest()[:16]}" for number in range(len(sessions))]
    with Journal(journal_path(out)) as journal:
        if not all(key in journal.entries for key in keys):
            with contextlib.closing(_Sampler(settings, sessions)) as sampler:
                fill(journal, keys, sampler, chunk=BATCH, concurrency=0, verb="sample", unit="session")
        texts = [journal.entries[key]["responses"] for key in keys]
    responses = [
        Response(session=number, user_id=session.user_id, text=text)
        for number, (session, answers) in enumerate(zip(sessions, texts, strict=True), 1)
        for text in answers
    ]
    write_record(out, wanted)
    write_responses(out, responses)
    journal_path(out).unlink()
    return responses


def policy_sha256(folder: Path) -> str:
    """One hash over the weights, config and tokenizer of a model folder.

    Raises:
        UserError: it is no model folder.
    """
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise UserError(
            f"--responses {show(str(folder))}: give a .jsonl or .parquet file, or a folder with a causal LM (safetensors)"
        )
    return sha256_of(folder)


class _Sampler:
    """Samples one batch of sessions; the engine loads with the first."""

    def __init__(self, settings: SampleSettings, sessions: Sequence[Session]) -> None:
        import torch

        from tppo_fast.loading import load_policy

        self._settings = settings
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
            n=own.samples, max_new_tokens=own.max_new_tokens, seed=derive(own.seed, "label", numbers[0])
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
