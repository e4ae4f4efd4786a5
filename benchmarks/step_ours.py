"""Whole iterations of tppo_fast on the prompts of a request, with some of its levers off; or of the padded baseline.

    python -m benchmarks.step_ours FOLDER

The request and its answer are those of a driver (``drivers/``). Given ``sequences``, the responses in them are learned from:
its own, where it samples any, are only timed.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.baseline_ppo import Baseline, pad
from benchmarks.counters import counted
from benchmarks.drivers import ruler
from tppo_fast import building, loading, losses, model, packing
from tppo_fast import config as settings
from tppo_fast.config import Config
from tppo_fast.data_types import Prompt, Rollout
from tppo_fast.model import ActorCritic
from tppo_fast.rollout import RolloutEngine, SamplingParams, build_engine
from tppo_fast.rollout.hf_engine import HFEngine

Phases = tuple[Callable[[list[Rollout], list[Tensor]], Any], Callable[[Any], Mapping[str, float]]]
"""(prepare(rollouts, rewards) -> prepared, update(prepared) -> metrics)."""
METRICS = tuple(f"ppo/{name}" for name in ("kl", "policy_loss", "value_loss", "entropy", "approx_kl", "grad_norm"))
NEEDED = ("perf/prepare_tflop", "perf/update_tflop")


def config_of(request: Mapping[str, Any], prompt_tokens: int, prompts: int) -> Config:
    samples, new = request["samples"], request["new_tokens"]
    shared = request.get("settings", {}).get("model", {}).get("share_prompts", True)
    group = prompt_tokens + samples * new if shared else samples * (prompt_tokens + new)
    values: dict[str, Any] = {
        "model": {"path": request["model"], "dtype": "bfloat16" if request["bfloat16"] else "float32"},
        "rollout": {
            "engine": "vllm" if request.get("rollout") == "vllm" else "hf",
            "prompts_per_step": prompts, "samples_per_prompt": samples, "max_new_tokens": new,
        },
        "algorithm": request.get("algorithm", "tppo"),
        "ppo": {
            "lr": request["lr"], "critic_lr": request["lr"], "adam_beta2": request["adam_beta2"],
            "max_grad_norm": request["max_grad_norm"],
            "epochs": request["epochs"], "kl_coef": request["kl_coef"], "gamma": request["gamma"], "lam": request["lam"],
            "clip_low": request["clip"], "clip_high": request["clip"], "value_clip": request["clip"],
            "value_coef": request["value_coef"], "microbatch_tokens": max(request["microbatch"] // samples, 1) * group,
            "kl_placement": "reward" if request.get("reference", True) else "off",
        },
        "train": {"steps": 10},
    }  # fmt: skip
    for section, changes in request.get("settings", {}).items():
        values[section] |= changes
    return settings.build(values)


def lean(request: Mapping[str, Any], config: Config, ac: ActorCritic) -> Phases:
    """tppo_fast; ``row_local`` off hides from it that the loss is row-local."""
    ppo = building.learner(config, ac, None if request.get("row_local", True) else lambda *a: losses.ppo(*a))
    found: dict[str, float] = {}

    def prepare(rollouts: list[Rollout], rewards: list[Tensor]) -> Any:
        train, metrics = ppo.prepare(packing.pack(rollouts, rewards, share_prompts=config.model.share_prompts))
        found.update(metrics)
        return train

    return prepare, lambda train: {**found, **ppo.update(train)}


def padded(request: Mapping[str, Any], config: Config, ac: ActorCritic) -> Phases:
    """The plain PyTorch baseline, on the same weights."""
    for lm in (ac.actor.lm, ac.critic.body):
        if lm is not None:
            lm.set_attn_implementation("sdpa")  # type: ignore[union-attr]
    reference = copy.deepcopy(ac.actor.lm).requires_grad_(False)
    critic = ac.actor.lm.base_model if config.model.shared_body else ac.critic.body
    baseline = Baseline(ac.actor.lm, critic, ac.critic.value_head, reference, lr=request["lr"])
    ppo = config.ppo

    def prepare(rollouts: list[Rollout], rewards: list[Tensor]) -> Any:
        batch = pad(rollouts, rewards)
        return batch, baseline.prepare(batch, kl_coef=ppo.kl_coef, gamma=ppo.gamma, lam=ppo.lam)

    def update(prepared: Any) -> Mapping[str, float]:
        options = {"clip": ppo.clip_low, "value_coef": ppo.value_coef, "max_grad_norm": ppo.max_grad_norm}
        steps = [baseline.update(*prepared, **options) for _ in range(ppo.epochs)]
        return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}

    return prepare, update


def run(request: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(the answer, the sequences that were learned from), every part built before the clock starts."""
    torch.set_num_threads(request["threads"])
    torch.manual_seed(0)
    prompts = _prompts(tensors["prompts"])
    config = config_of(request, len(prompts[0].token_ids), len(prompts))
    base, device = ruler.peak_gib(), "cuda" if torch.cuda.is_available() else "cpu"
    ac, tokenizer = model.build(config.model, device, critic=request.get("algorithm", "tppo") == "tppo")
    if hasattr(ac.critic, "value_head"):
        with torch.no_grad():
            ac.critic.value_head.weight.copy_(tensors["value_head"][None])
    prepare, update = (padded if request.get("padded") else lean)(request, config, ac)
    engine = _engine(request, config, tokenizer, device) if request.get("rollout") else None
    watch, counts, metrics, sequences = ruler.Stopwatch(), {}, [], []
    with contextlib.closing(engine) if engine else contextlib.nullcontext():
        for i in range(request["iterations"]):
            watch.begin()
            rollouts: list[Rollout] = []
            if engine:
                engine.load_weights(ac.actor.named_weights(), version=i)
                rollouts = engine.generate(
                    prompts, SamplingParams(n=request["samples"], max_new_tokens=request["new_tokens"], seed=i)
                )
                watch.mark("rollout")
            if replayed := "sequences" in tensors:
                rollouts = _replayed(tensors["sequences"][i], prompts)
            ids = torch.tensor([[*r.prompt.token_ids, *r.token_ids] for r in rollouts])
            paid = ruler.even_share(ids[:, len(prompts[0].token_ids) :])
            rewards = [torch.zeros(request["new_tokens"]).index_fill(0, torch.tensor([-1]), float(p)) for p in paid]
            train = _maybe_counted("prepare", lambda r=rollouts, p=rewards: prepare(r, p), counts, request)
            watch.mark("prepare")
            learned = _maybe_counted("update", lambda t=train: update(t), counts, request)
            watch.end()
            found = {key.split("/")[1]: learned[key] for key in (*METRICS, *NEEDED) if key in learned}
            metrics.append({"reward": float(paid.mean()), **found})
            sequences.append(tensors["sequences"][i] if replayed else ids)
            del train
    answer = {"iterations": watch.iterations, "metrics": metrics, "base_gib": base, **counts}
    out = {"sequences": torch.stack(sequences)}
    if request.get("learned"):
        lm = loading.load_causal_lm(request["model"]).to(device)  # as its makers run it, whatever packs it here
        lm.load_state_dict(dict(ac.actor.named_weights()))
        out |= ruler.final_logprobs(lm, sequences[-1], request)
    return answer, out


def _maybe_counted(name: str, phase: Callable[[], Any], counts: dict[str, Any], request: Mapping[str, Any]) -> Any:
    return counted(name, phase, counts) if request.get("count") else phase()


def _engine(request: Mapping[str, Any], config: Config, tokenizer: Any, device: str) -> RolloutEngine:
    """transformers generate, as TRL samples, or vLLM; every response has full length."""
    if request["rollout"] == "vllm":
        engine = build_engine(config, tokenizer, torch.device(device))
        engine._stop.clear()  # type: ignore[attr-defined]
        return engine
    lm = loading.load_causal_lm(request["model"]).to(device)
    engine = HFEngine(lm, tokenizer)
    lm.generation_config.min_new_tokens = request["new_tokens"]
    return engine


def _prompts(ids: Tensor) -> list[Prompt]:
    nothing: dict[str, Any] = {"user_id": "", "history": (), "next_queries": (), "relevant_queries": ()}
    return [Prompt(token_ids=row, **nothing) for row in ids.tolist()]


def _replayed(sequences: Tensor, prompts: list[Prompt]) -> list[Rollout]:
    """Rows [B, P + R] in any order as rollouts, those of one prompt next to each other."""
    width = len(prompts[0].token_ids)
    number = {tuple(prompt.token_ids): i for i, prompt in enumerate(prompts)}
    rows = sorted(sequences.tolist(), key=lambda row: number[tuple(row[:width])])
    sampled: dict[str, Any] = {"text": "", "finish_reason": "length", "policy_version": 0}
    return [
        Rollout(
            prompt=prompts[number[tuple(row[:width])]], token_ids=row[width:],
            logprobs=[0.0] * (len(row) - width), **sampled,
        )
        for row in rows
    ]  # fmt: skip


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    ruler.write(folder, *run(*ruler.read(folder)))
