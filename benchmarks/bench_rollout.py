"""Rollout tokens per second on the same prompts, weights and sampling: ``python -m benchmarks --suite rollout``.

Every engine lives in this process, holds the same published weights, and takes turns. Prompt lengths spread evenly up to the
longest, as those of search histories do: generate pays for left padding, and TRL has it compute a prompt once for each of its
responses; ours and vLLM compute it once for all. An engine's log-probabilities must be the trainer's (``parity.LIMITS``) before
it is timed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers, providers
from benchmarks.measure import from_place, host_peak
from benchmarks.results import Options, Outcome, Result, summarise
from tppo_fast import config as settings
from tppo_fast import loading, model, packing, parity, trainer
from tppo_fast.config import Config
from tppo_fast.data_types import Prompt, Rollout
from tppo_fast.rollout import RolloutEngine, SamplingParams, build_engine

ROUNDS = 3
NEW_TOKENS = 16
ENGINES = {"tppo_fast: vLLM": "vllm", "tppo_fast: transformers": "hf"}
BASELINE = "tppo_fast: transformers"
SWEEP = [(4, 4, 64), (1, 4, 64), (12, 4, 64), (4, 1, 64), (4, 2, 64), (4, 4, 32), (4, 4, 128)]
"""(prompts, samples per prompt, longest prompt)."""
QUICK = [(2, 2, 8)]


class TRLGenerate:
    """How TRL's PPO trainer samples: ``batch_generation`` on left-padded queries, then log-probabilities from all its logits."""

    def __init__(self, lm: Any, eos: int, batch_generation: Any, selective_log_softmax: Any) -> None:
        self._lm, self._eos = lm.eval().requires_grad_(False), eos
        self._generate, self._select = batch_generation, selective_log_softmax

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        from transformers import GenerationConfig

        repeated = [prompt for prompt in prompts for _ in range(sampling.n)]
        width = max(len(p.token_ids) for p in repeated)
        pad = -1  # no token's id: TRL masks what equals it
        queries = torch.tensor([[pad] * (width - len(p.token_ids)) + [*p.token_ids] for p in repeated])
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens, temperature=sampling.temperature, top_k=0, top_p=1.0, do_sample=True,
            eos_token_id=self._eos, pad_token_id=self._eos,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sampling.seed)
            out, logits = self._generate(self._lm, queries, len(queries), pad, config)
        tokens = out[:, width:]
        logprobs = self._select(logits, tokens)
        return [_rollout(*row, self._eos) for row in zip(repeated, tokens.tolist(), logprobs.tolist(), strict=True)]

    def close(self) -> None:
        self._lm = None


def _rollout(prompt: Prompt, tokens: list[int], logprobs: list[float], eos: int) -> Rollout:
    length = tokens.index(eos) + 1 if eos in tokens else len(tokens)
    return Rollout(
        prompt=prompt, token_ids=tokens[:length], logprobs=logprobs[:length], text="",
        finish_reason="stop" if eos in tokens else "length", policy_version=0,
    )  # fmt: skip


def random_prompts(count: int, longest: int, vocabulary: int, seed: int) -> list[Prompt]:
    """Prompts of random tokens, their lengths evenly spread from a quarter of the longest to it, in random order."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.linspace(longest, max(longest // 4, 1), count).long()[torch.randperm(count, generator=g)]
    rows = [torch.randint(3, vocabulary // 2, (int(length),), generator=g).tolist() for length in lengths]
    nothing: dict[str, Any] = {"user_id": "", "history": (), "next_queries": (), "relevant_queries": ()}
    return [Prompt(token_ids=row, **nothing) for row in rows]


@torch.no_grad()
def disagreement(actor: model.Actor, rollouts: Sequence[Rollout], config: Config) -> str | None:
    """Why the engine's log-probabilities are not the trainer's, or None; (at most 32 of) the rollouts are looked at."""
    some = list(rollouts[:32])
    batch = packing.pack(some, [torch.tensor(r.logprobs) for r in some]).to(actor.device)
    logp, _ = actor.logprobs(actor.hidden(batch)[batch.state_index], batch.actions, 1.0)
    measured = parity.metrics(batch.behaviour_logprobs.cpu(), logp.cpu())
    for name, limit in zip(("parity/mean", "parity/max"), parity.LIMITS[config.model.dtype], strict=True):
        if not measured[name] <= limit:
            return f"it disagrees: {name} is {float(measured[name]):.3g} nats, at most {limit:g} is allowed"
    return None


def engines_of(
    config: Config, actor: model.Actor, tokenizer: Any, names: Sequence[str] | None
) -> dict[str, RolloutEngine | TRLGenerate | str]:
    """Row -> its engine with the actor's weights, or why there is none."""
    wanted = {p.name for p in providers.chosen("rollout", names)}
    found: dict[str, RolloutEngine | TRLGenerate | str] = {}
    for row, engine in ENGINES.items() if "tppo_fast" in wanted else ():
        at = config.model_copy(update={"rollout": config.rollout.model_copy(update={"engine": engine})})
        try:
            built = build_engine(at, tokenizer, actor.device)
            built.load_weights(actor.named_weights(), version=0)
            found[row] = built
        except Exception as error:  # not installed, or it does not start: the others go on
            found[row] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if "TRL" in wanted:
        parts = (
            peers.find("trl.experimental.ppo.ppo_trainer", "batch_generation"),
            peers.find("trl.trainer.utils", "selective_log_softmax"),
        )
        problem = next((part for part in parts if isinstance(part, str)), None)
        lm = None if problem else loading.load_causal_lm(config.model.path)
        found["TRL"] = problem or TRLGenerate(lm, tokenizer.eos_token_id, *parts)
    return found


def compare(
    engines: dict[str, Any],
    actor: model.Actor,
    config: Config,
    size: tuple[int, int, int],
    options: Options,
    vocabulary: int,
) -> list[Result]:
    """Every engine on the same prompts, which are others in each round."""
    prompts, samples, longest = size
    new = config.rollout.max_new_tokens
    family = f"rollout, {new} new tokens, {Path(config.model.path).name}"
    sizes = {"prompts": prompts, "samples a prompt": samples, "longest prompt": longest}
    case = f"{family}: {', '.join(f'{n} {axis}' for axis, n in sizes.items())}"
    rows = {
        name: Result(
            case=case, provider=name, family=family, sizes=sizes, unit="tokens/s", baseline=name == BASELINE,
            problem=engine if isinstance(engine, str) else None,
        )
        for name, engine in engines.items()
    }  # fmt: skip
    for k in range(options.rounds or (1 if options.quick else ROUNDS)):
        given = random_prompts(prompts, longest, vocabulary, options.seed + k)
        sampling = SamplingParams(n=samples, max_new_tokens=new, seed=options.seed + k)
        for name in from_place(list(rows), k):
            row = rows[name]
            if row.problem is None:
                seconds, rollouts, peak = _timed(partial(engines[name].generate, given, sampling))
                row.problem = disagreement(actor, rollouts, config) if not k else None
                if row.problem is None:
                    row.values.append(sum(len(r.token_ids) for r in rollouts) / seconds)
                    row.host_peak_bytes = max(row.host_peak_bytes or 0, peak)
    summarise(list(rows.values()))
    return list(rows.values())


def _timed(generate: Any) -> tuple[float, list[Rollout], int]:
    seconds = 0.0

    def run() -> list[Rollout]:
        nonlocal seconds
        began = time.perf_counter()
        rollouts = generate()
        seconds = time.perf_counter() - began
        return rollouts

    rollouts, peak = host_peak(run)
    return seconds, rollouts, peak


def run(options: Options) -> Outcome:
    """The suite on this machine's device."""
    torch.set_num_threads(options.threads)
    new = 4 if options.quick else NEW_TOKENS
    config = settings.build(
        {
            "threads": options.threads, "model": {"path": str(options.model)}, "rollout": {"max_new_tokens": new},
            "data": {"max_prompt_tokens": max(longest for *_, longest in SWEEP)},
        }
    )  # fmt: skip
    actor_critic, tokenizer = model.build(config.model, trainer.resolve_device("auto"))
    actor = actor_critic.actor
    found: list[Result] = []
    with contextlib.ExitStack() as stack:
        engines = engines_of(config, actor, tokenizer, options.providers)
        for engine in engines.values():
            if not isinstance(engine, str):
                stack.enter_context(contextlib.closing(engine))
                engine.generate(random_prompts(1, 8, len(tokenizer), 0), SamplingParams(max_new_tokens=2))  # warm-up
        for size in QUICK if options.quick else SWEEP:
            print(f"rollout: {size[0]} prompts x {size[1]}, up to {size[2]} tokens", flush=True)
            found += compare(engines, actor, config, size, options, len(tokenizer))
    return Outcome(
        results=found, settings={"model": options.model.name, "dtype": config.model.dtype, "new_tokens": new}
    )
