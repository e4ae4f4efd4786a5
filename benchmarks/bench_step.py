"""One PPO step on a CPU: the lean loop, each of its levers off in turn, and PPO as it is usually written.

    python -m benchmarks.bench_step --model .cache/smollm2 --threads 2 --out benchmarks/results/cpu/step.json
    python -m benchmarks.bench_step --model FOLDER --tiny --out step.json          (a few tokens: that this file runs)

Every provider gets the same prompts, responses and rewards. Each run is a process of its own, and providers take turns:
one run counts, the others time. Counted are the FLOPs (torch's counter, with its formulas for the CPU's attention kernel and
for the head ops, too) and the peak of the bytes alive beyond what lived before the phase, gradients and activations, seen by
every operator that made or dropped a tensor. Beside the seconds of the other runs stands the process's own peak. Exits with
1 when losses or gradient norms differ by more than rounding.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import tppo_kernels  # noqa: F401  (registers its ops)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baseline_ppo import Baseline, pad
from benchmarks.machine import commit
from tppo_fast import config as settings
from tppo_fast import losses, model, packing
from tppo_fast.data_types import Prompt, Rollout
from tppo_fast.ppo import PPO

LEAN = {"shared_body": True, "share_prompts": True, "row_local": True}
PROVIDERS: dict[str, dict[str, bool] | None] = {
    "lean": LEAN,
    "prompts not shared": {**LEAN, "share_prompts": False},
    "critic with a body of its own": {**LEAN, "shared_body": False},
    "head at four units": {**LEAN, "row_local": False},
    "all off": {"shared_body": False, "share_prompts": False, "row_local": False},
    "padded baseline": None,
}
SAME = ("ppo/value_loss", "ppo/entropy")
"""Equal for every provider: a critic of its own starts as a copy of the policy's body, with the same value head."""
AS_WELL = ("ppo/grad_norm",)
"""Equal where the value loss reaches the same weights: with, or without, a body of its own."""
aten = torch.ops.aten


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two products over all pairs of positions, as torch counts its CUDA kernel: [.., H, Lq, d] with [.., Lk, d]."""
    del value, out_shape
    return 4 * math.prod(query) * key[-2]


def _attention_backward_flops(grad: Any, query: Any, key: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Five products: the scores again, and the gradients of weights, values, queries and keys."""
    del grad, out_shape
    return 10 * math.prod(query) * key[-2]


def _head_flops(hidden: Any, weight: Any, *_: Any, **__: Any) -> int:
    """One unit: the logits."""
    return 2 * hidden[0] * math.prod(weight)


def _head_backward_flops(hidden: Any, weight: Any, *rest: Any, **__: Any) -> int:
    """The logits again, and a product for each gradient that is wanted."""
    return (1 + sum(rest[7][:2])) * 2 * hidden[0] * math.prod(weight)


FORMULAS = {  # what torch's counter does not know
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    torch.ops.tppo_kernels.native_linear_logprobs: _head_flops,
    torch.ops.tppo_kernels.native_linear_logprobs_backward: _head_backward_flops,
}


class LiveBytes(TorchDispatchMode):
    """The peak of the bytes of tensors made inside, as operators make them and the last reference drops them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        given = [x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._see(x.untyped_storage(), given)
        return out

    def _see(self, storage: Any, given: list[Any]) -> None:
        if storage in self._known or any(storage is g for g in given):
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size


def rollouts_of(args: argparse.Namespace, vocabulary: int) -> tuple[list[Rollout], list[torch.Tensor]]:
    """Random prompts and responses, and a random reward for every token."""
    g = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(3, vocabulary, (length,), generator=g).tolist()

    nothing: dict[str, Any] = {"user_id": "", "history": (), "next_queries": (), "relevant_queries": ()}
    sampled: dict[str, Any] = {
        "logprobs": [0.0] * args.new_tokens,
        "text": "",
        "finish_reason": "stop",
        "policy_version": 0,
    }
    rollouts = []
    for _ in range(args.prompts):
        prompt = Prompt(token_ids=ids(args.prompt_tokens), **nothing)
        for _ in range(args.samples):
            rollouts.append(Rollout(prompt=prompt, token_ids=ids(args.new_tokens), **sampled))
    return rollouts, [torch.randn(args.new_tokens, generator=g) for _ in rollouts]


def phases(args: argparse.Namespace) -> tuple[Any, Any]:
    """(prepare() -> prepared, update(prepared) -> metrics) of the provider, everything built."""
    levers = PROVIDERS[args.provider]
    shared = levers is not None and levers["shared_body"]
    values = {
        "model": {"path": args.model, "shared_body": shared},
        "rollout": {
            "prompts_per_step": args.prompts,
            "samples_per_prompt": args.samples,
            "max_new_tokens": args.new_tokens,
        },
        "ppo": {"lr": 1e-6, "epochs": 1, "kl_coef": 0.05, "microbatch_tokens": 1 << 20},
    }
    config = settings.build(values)
    ac, tokenizer = model.build(config.model, "cpu")
    torch.nn.init.normal_(ac.critic.value_head.weight, std=0.01, generator=torch.Generator().manual_seed(1))
    rollouts, rewards = rollouts_of(args, len(tokenizer))
    if levers is None:
        for lm in (ac.actor.lm, ac.critic.body):
            lm.set_attn_implementation("sdpa")  # type: ignore[union-attr]
        reference = copy.deepcopy(ac.actor.lm).requires_grad_(False)
        baseline = Baseline(ac.actor.lm, ac.critic.body, ac.critic.value_head, reference, lr=1e-6)
        padded, ppo = pad(rollouts, rewards), config.ppo
        return (
            lambda: baseline.prepare(padded, kl_coef=ppo.kl_coef, gamma=ppo.gamma, lam=ppo.lam),
            lambda prepared: baseline.update(padded, prepared, clip=ppo.clip_low, value_clip=ppo.value_clip or 0.0),
        )
    loss = losses.ppo if levers["row_local"] else lambda *a: losses.ppo(*a)
    ppo = PPO(config, ac, ac.actor.frozen_copy(), loss, total_steps=10)
    batch = packing.pack(rollouts, rewards, share_prompts=levers["share_prompts"])
    return lambda: ppo.prepare(batch)[0], ppo.update


def child(args: argparse.Namespace) -> dict[str, Any]:
    """One step of one provider in this process."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    prepare, update = phases(args)
    found: dict[str, Any] = {"base_gib": _peak_gib()}
    prepared = _measured("prepare", prepare, found, args.count)
    metrics = _measured("update", lambda: update(prepared), found, args.count)
    return found | {"metrics": {key: metrics[key] for key in (*SAME, *AS_WELL)}, "peak_gib": _peak_gib()}


def _measured(name: str, run: Callable[[], Any], found: dict[str, Any], count: bool) -> Any:
    """What the phase returned; its counts or its seconds go into ``found``."""
    if count:
        with LiveBytes() as live, FlopCounterMode(display=False, custom_mapping=FORMULAS) as flops:
            out = run()
        found |= {f"{name}_flops": flops.get_total_flops(), f"{name}_live_bytes": live.peak}
    else:
        began = time.perf_counter()
        out = run()
        found[f"{name}_seconds"] = time.perf_counter() - began
    return out


def _peak_gib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def spawn(args: argparse.Namespace, provider: str, count: bool) -> dict[str, Any]:
    """``child`` in a process of its own; in this one for a tiny run, which measures nothing."""
    if args.tiny:
        return child(argparse.Namespace(**{**vars(args), "provider": provider, "count": count}))
    command = [sys.executable, "-m", "benchmarks.bench_step", "--model", args.model, "--provider", provider]
    for name in ("threads", "prompts", "samples", "prompt_tokens", "new_tokens"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    done = subprocess.run([*command, *(["--count"] if count else [])], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{provider} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Every provider counted once and timed ``rounds`` times, in turns."""
    rows: dict[str, dict[str, Any]] = {}
    for name in PROVIDERS:
        rows[name] = {**spawn(args, name, True), "prepare_seconds": [], "update_seconds": [], "process_peak_gib": []}
        print(f"counted: {name}", flush=True)
    for _ in range(args.rounds):
        for name, row in rows.items():
            run = spawn(args, name, False)
            row["prepare_seconds"].append(run["prepare_seconds"])
            row["update_seconds"].append(run["update_seconds"])
            row["process_peak_gib"].append(run["peak_gib"])
            print(f"timed: {name}: update {run['update_seconds']:.2f} s", flush=True)
    lean = rows["lean"]
    for row in rows.values():
        row["update_flops_over_lean"] = row["update_flops"] / lean["update_flops"]
        row["update_live_bytes_over_lean"] = row["update_live_bytes"] / lean["update_live_bytes"]
        row["update_seconds_over_lean"] = statistics.median(row["update_seconds"]) / statistics.median(
            lean["update_seconds"]
        )
    return rows


def problems(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Where providers disagree by more than rounding."""
    found = []
    for name, row in rows.items():
        levers = PROVIDERS[name]
        alike = "lean" if levers and levers["shared_body"] else "all off"
        for key in (*SAME, *AS_WELL):
            expected = rows[alike if key in AS_WELL else "lean"]["metrics"][key]
            if not abs(row["metrics"][key] - expected) <= 1e-3 * abs(expected):
                found.append(f"{name}: {key} is {row['metrics'][key]:.6g}, expected {expected:.6g}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="48 prompt tokens, responses of 4, one round, one process")
    parser.add_argument("--provider", choices=PROVIDERS, help=argparse.SUPPRESS)
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tiny:
        args.prompt_tokens, args.new_tokens, args.rounds = 48, 4, 1
    if args.provider:
        print(json.dumps(child(args)))
        return
    rows = compare(args)
    wrong = problems(rows)
    report = {
        "commit": commit(),
        "device": platform.processor() or platform.machine(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "arguments": {**vars(args), "out": str(args.out), "model": Path(args.model).name},
        "problems": wrong,
        "providers": rows,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    for name, row in rows.items():
        print(
            f"{name:32}FLOPs {row['update_flops_over_lean']:5.2f}x  memory {row['update_live_bytes_over_lean']:5.2f}x  "
            f"time {row['update_seconds_over_lean']:5.2f}x"
        )
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
