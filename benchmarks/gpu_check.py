"""One command on the GPU machine: correctness first, then every op against its peers, as a share of measured ceilings.

    python -m benchmarks.gpu_check --out benchmarks/results/h200/ops.json [--wheels FOLDER] [--minutes 8]
    python -m benchmarks.gpu_check --dry             (tiny shapes on the CPU: that this file runs)

Needs no network: peers that are missing (Liger, TRL, QuACK, CCE, verl) are installed from the wheels in FOLDER into a
temporary folder, and those that are not there are left out by name. Nothing is timed while the gate is red, and a provider
is timed only if it computes the same numbers. Exits with 1 when one of our ops fails the gate.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import tppo_kernels as tk
from torch import Tensor
from tppo_kernels import reference
from tppo_kernels.testing import random_head, random_logits, random_ppo, random_rollouts

from benchmarks.bench_ops import Case, CpuMeter, Outputs, Result, Run, commit, gate, leaves, measure, padded_gae, table
from benchmarks.gate import LEARNED, check_everything, ppo_run


class GpuMeter:
    """CUDA events with a flushed L2, and the allocator's peak."""

    def __init__(self) -> None:
        self.flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")

    def time(self, run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        kept = run()
        end.record()
        end.synchronize()
        del kept
        return start.elapsed_time(end) / 1e3

    def peak(self, run: Run) -> int:
        run()  # compiles and tunes
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = run()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before


def install_peers(folder: Path | None) -> None:
    """Install the folder's wheels where only this process sees them."""
    wheels = sorted(folder.glob("*.whl")) if folder else []
    if wheels:
        target = tempfile.mkdtemp(prefix="peers")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target]
        subprocess.run([*command, *map(str, wheels)], check=True)
        sys.path.append(target)


def peer(module: str, name: str) -> Any:
    """The peer's function, or None with a line that says it is left out."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        print(f"left out: {module}.{name} ({type(error).__name__}: {str(error)[:100]})", flush=True)
        return None


def best(run: Run, meter: Any, rounds: int = 5) -> float:
    run()
    return min(meter.time(run) for _ in range(rounds))


def ceilings(device: str, meter: Any, *, dry: bool) -> tuple[float, float]:
    """(bytes per second of a device copy, FLOP per second of a bf16 GEMM on random data)."""
    size, n = (1 << 20, 128) if dry else (1 << 30, 8192)
    source = torch.randint(0, 100, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    copy = 2 * size / best(lambda: [target.copy_(source)], meter)
    return copy, 2 * n**3 / best(lambda: [a @ b], meter)


def rows_case(device: str, backend: str | None, rows: int, vocab: int, copy: float, *, backward: bool) -> Case:
    logits, targets = random_logits(rows, vocab, torch.bfloat16, device=device)
    selective, entropies = (peer("trl.trainer.utils", n) for n in ("selective_log_softmax", "entropy_from_logits"))
    compiled = torch.compile(reference.logprobs_from_logits)

    def run(op: Callable[..., Any], x: Tensor = logits) -> Outputs:
        if not backward:
            with torch.no_grad():
                return op(x, targets)
        x = x.detach().requires_grad_()
        out = op(x, targets)
        return [*out, *torch.autograd.grad([o.sum() for o in out], x)]

    providers: dict[str, Run] = {
        "tppo": lambda: run(lambda x, y: tk.logprobs_from_logits(x, y, backend=backend)),
        "eager": lambda: run(reference.logprobs_from_logits),
        "torch.compile": lambda: run(compiled),
    }
    if selective and entropies:
        providers["TRL"] = lambda: run(lambda x, y: (selective(x.float(), y), entropies(x.float())))
    passes = 3 if backward else 1  # read; read again and write
    return Case(
        name=f"logprob + entropy, {'forward + backward' if backward else 'forward'}, [{rows}, {vocab}] bf16",
        baseline="eager", ours=("tppo",), providers=providers, ideal_seconds=2 * passes * rows * vocab / copy,
        truth=lambda: (run(reference.logprobs_from_logits), run(reference.logprobs_from_logits, logits.double())),
    )  # fmt: skip


def head_case(
    device: str, backend: str | None, actions: int, hidden_size: int, vocab: int, gemm: float, *, entropy: bool
) -> Case:
    """With the entropy term, the heads that return it; without, also plain cross-entropies."""
    hidden, weight, targets = random_head(actions, hidden_size, vocab, torch.bfloat16, device=device)
    x = random_ppo(actions, device=device)
    coefficient = 0.01 if entropy else 0.0

    def loss_of(logp: Tensor, h: Tensor, old: Tensor, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return tk.ppo_loss(
            logp, old, advantages, entropy=h if entropy else None, entropy_coef=coefficient, normalizer=1.0,
            backend="reference" if logp.dtype == torch.float64 else backend,
        )  # fmt: skip

    with torch.no_grad():
        exact = tk.linear_logprobs(hidden.float(), weight.float(), targets, backend="reference")[0]
        rows = exact + 0.2 * torch.randn_like(exact), x["advantages"]

    def run(head: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype = torch.bfloat16) -> Outputs:
        h, w = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
        loss = head(h, w)
        return [loss, *torch.autograd.grad(loss, [h, w])]

    def of(pair: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Run:
        def loss(h: Tensor, w: Tensor) -> Tensor:
            logp, entropies = pair(h, w)
            return loss_of(logp, entropies, *(r.to(logp.dtype) for r in rows))[0] / actions

        return lambda: run(loss)

    def ours(chunk: int | None, dtype: torch.dtype) -> Run:
        return lambda: run(lambda h, w: tk.linear_token_loss(
            h, w, targets, loss_of, rows, chunk_size=chunk, logits_dtype=dtype, backend=backend)[0])  # fmt: skip

    def full(h: Tensor, w: Tensor) -> Tensor:
        pair = reference.logprobs_from_logits(h @ w.t(), targets)
        return loss_of(*pair, *(r.to(pair[0].dtype) for r in rows))[0] / actions

    compiled = torch.compile(full)
    providers: dict[str, Run] = {
        "tppo, 3 units": ours(None, torch.bfloat16),
        "tppo, 3 units, chunks of 2048": ours(2048, torch.bfloat16),
        "tppo, 3 units, fp32 logits": ours(None, torch.float32),
        "tppo, 4 units": of(lambda h, w: tk.linear_logprobs(h, w, targets, backend=backend)),
        "eager": lambda: run(full),
        "torch.compile": lambda: run(compiled),
    }
    providers |= {name: of(pair) for name, pair in _peer_heads(targets, entropy=entropy).items()}
    names = tuple(name for name in providers if name.startswith("tppo"))
    return Case(
        name=f"PPO loss of a head{', entropy term' if entropy else ''}, [{actions} x {hidden_size}] x {vocab} bf16",
        baseline="eager", ours=names, providers=providers, ideal_seconds=6 * actions * hidden_size * vocab / gemm,
        truth=lambda: (run(full), run(full, torch.float64)),
    )  # fmt: skip


def _peer_heads(targets: Tensor, *, entropy: bool) -> dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """name -> (hidden, weight) -> (logp, entropy or zeros)."""
    heads: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {}
    if liger := peer("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction"):

        def liger_pair(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            nll, entropies = liger.apply(h, w, targets, 1.0, -100, 1, True)
            return -nll, entropies

        heads["Liger"] = liger_pair
    if verl := peer("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy"):
        heads["verl"] = lambda h, w: verl(h, w, targets, 1.0, "none")
    if entropy:
        return heads
    if trl := peer("trl.trainer.utils", "_ChunkedLogProbFunction"):
        heads["TRL"] = lambda h, w: trl.apply(h, w, targets, 1.0, 8192, None, 1.0)[:2]
    if cce := peer("cut_cross_entropy", "linear_cross_entropy"):
        for name, eps in (("CCE", "auto"), ("CCE, filter off", None)):
            heads[name] = lambda h, w, eps=eps: _only(-cce(h, w, targets, reduction="none", filter_eps=eps))
    if quack := peer("quack.linear_cross_entropy", "chunked_linear_cross_entropy"):
        heads["QuACK"] = lambda h, w: _only(-quack(h, w, targets, reduction="none"))
    return heads


def _only(logp: Tensor) -> tuple[Tensor, Tensor]:
    return logp, torch.zeros_like(logp)


def gae_case(device: str, backend: str | None, lengths: list[int], copy: float) -> Case:
    x = random_rollouts(lengths, device=device)
    packed = x["rewards"], x["values"], x["cu_seqlens"]
    providers: dict[str, Run] = {"tppo": lambda: tk.gae(*packed, gamma=0.99, backend=backend)[:2]}
    if len(set(lengths)) == 1 and lengths[0] <= 4096:
        square = packed[0].view(len(lengths), -1), packed[1].view(len(lengths), -1)
        providers["padded loop"] = lambda: [t.flatten() for t in padded_gae(*square, 0.99, 0.95)]
    wide = packed[0].double(), packed[1].double(), packed[2]
    return Case(
        name=f"GAE, {len(lengths)} sequences, {sum(lengths)} actions", baseline=list(providers)[-1], ours=("tppo",),
        providers=providers, ideal_seconds=16 * sum(lengths) / copy,
        truth=lambda: (reference.gae(*packed, gamma=0.99), reference.gae(*wide, gamma=0.99)),
    )  # fmt: skip


def ppo_case(device: str, backend: str | None, actions: int, copy: float) -> Case:
    run = ppo_run(random_ppo(actions, device=device))
    compiled = torch.compile(reference.ppo_loss)
    x = random_ppo(actions, device=device)

    def compiled_run() -> Outputs:
        y: dict[str, Any] = leaves(x, LEARNED)
        loss, metrics = compiled(**y, kl_coef=0.1, entropy_coef=0.01, dual_clip=2.0)
        return [loss, *metrics.values(), *torch.autograd.grad(loss, [y[k] for k in LEARNED])]

    return Case(
        name=f"PPO loss of every term, metrics and gradients, {actions} actions", baseline="eager", ours=("tppo", "eager"),
        providers={"tppo": lambda: run(backend, None), "eager": lambda: run("reference", None), "torch.compile": compiled_run},
        ideal_seconds=4 * 11 * actions / copy, truth=lambda: (run("reference", None), run("reference", torch.float64)),
    )  # fmt: skip


Builder = Callable[[bool], Case]
"""small -> the case: with few rows for the gate, or in full."""


def plan(device: str, backend: str | None, copy: float, gemm: float, *, dry: bool) -> list[Builder]:
    heads = [(16, 300)] if dry else [(2048, 151_936), (4096, 128_256)]
    full_rows = 32 if dry else 16_384
    segments = [[512] * 4, [2000]] if dry else [[512] * 2048, [16_384] * 64, [1 << 20]]
    vocab, actions = heads[0][1], 5000 if dry else 1 << 20

    def rows(small: bool) -> int:
        return min(64, full_rows) if small else full_rows

    def head(d: int, v: int, entropy: bool) -> Builder:
        return lambda small: head_case(
            device, backend, 4 * rows(True) if small else full_rows, d, v, gemm, entropy=entropy
        )

    plans: list[Builder] = [head(d, v, entropy) for d, v in heads for entropy in (True, False)]
    plans += [
        lambda small, b=b: rows_case(device, backend, rows(small), vocab, copy, backward=b) for b in (False, True)
    ]
    plans += [
        lambda small, s=s: gae_case(device, backend, [min(s[0], 3000)] * 2 if small else s, copy) for s in segments
    ]
    return [*plans, lambda small: ppo_case(device, backend, 5000 if small else actions, copy)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--wheels", type=Path, help="a folder of peers' wheels")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--minutes", type=float, default=8.0, help="no case starts after this")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    started = time.monotonic()
    install_peers(options.wheels)
    device, backend, meter = ("cpu", None, CpuMeter()) if options.dry else ("cuda", "triton", GpuMeter())
    problems = check_everything(device, backend, dry=options.dry)
    if problems:
        sys.exit("\n".join(["the gate is red, nothing is timed:", *problems]))
    print(f"the gate is green after {time.monotonic() - started:.0f} s", flush=True)
    copy, gemm = ceilings(device, meter, dry=options.dry)
    results: list[Result] = []
    skipped = 0
    for build in plan(device, backend, copy, gemm, dry=options.dry):
        if time.monotonic() - started > 60 * options.minutes:
            skipped += 1
            continue
        verdict = gate(build(True))
        results += measure(build(False), meter, options.rounds, verdict)
    report = {
        "device": f"{'CPU, dry' if options.dry else torch.cuda.get_device_name()}, copy {copy / 1e12:.2f} TB/s, bf16 GEMM "
        f"{gemm / 1e12:.0f} TFLOP/s", "torch": torch.__version__, "commit": commit(), "skipped_cases": skipped,
        "results": [asdict(r) for r in results],
    }  # fmt: skip
    print(table(report))
    if skipped:
        print(f"{skipped} cases were left out: the time was over")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    if any(r.problem for r in results if r.provider.startswith("tppo")):
        sys.exit("one of our ops failed a case's gate")


if __name__ == "__main__":
    main()
