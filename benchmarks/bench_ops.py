"""The fused ops against eager torch, torch.compile and independent implementations, interleaved in one run.

    python -m benchmarks.bench_ops --threads 2 --rounds 7 --out benchmarks/results/cpu/ops.json
    python -m benchmarks.bench_ops --table benchmarks/results/cpu/ops.json

Every provider first passes the correctness gate (the tolerance rule of ``tppo_kernels.testing``): one that fails is not
timed. Providers take turns; a figure is the median with its 20 and 80 % quantiles, and the peak memory beside it is what the
call held beyond its inputs, its results included.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tppo_kernels as tk
from torch import Tensor
from tppo_kernels import native, reference
from tppo_kernels.testing import close, random_head, random_logits, random_ppo, random_rollouts

Outputs = Sequence[Tensor]
Run = Callable[[], Outputs]
SPEED_MARKS = "<!-- speed: written by benchmarks.bench_ops -->", "<!-- end of speed -->"
IN_PLACE = "native, in place (with the copy that restores the logits)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One comparison: providers that compute the same tensors."""

    name: str
    """What is computed, with its shape."""
    baseline: str
    """The provider that speed-ups refer to."""
    providers: dict[str, Run]
    """Each call computes outputs and gradients from the case's inputs."""
    truth: Callable[[], tuple[Outputs, Outputs]]
    """(eager's outputs in the case's precision, the fp64 truth), for the gate."""
    ours: tuple[str, ...] = ()
    """Providers held to the tolerance rule; the others to three times eager's error plus 1e-3, in norm."""
    ideal_seconds: float | None = None
    """The time at the measured ceiling of the device, where one is known."""


@dataclass(slots=True, kw_only=True)
class Result:
    """One provider's row."""

    case: str
    provider: str
    problem: str | None
    """Why it was not timed, or None."""
    peak_bytes: int = 0
    seconds: list[float] = field(default_factory=list)
    median: float = 0.0
    q20: float = 0.0
    q80: float = 0.0
    speedup: float | None = None
    """The baseline's median over this one's."""
    share_of_ceiling: float | None = None


class CpuMeter:
    """Wall clock, and the process's peak resident memory (Linux)."""

    name = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"

    def time(self, run: Run) -> float:
        gc.collect()
        start = time.perf_counter()
        run()
        calls = min(max(int(0.05 / (time.perf_counter() - start)), 1), 1000)  # short calls are repeated
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    def peak(self, run: Run) -> int:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed and kept would hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from now
        before = self._status("VmRSS")
        kept = run()
        peak = self._status("VmHWM") - before
        del kept
        return max(peak, 0)

    @staticmethod
    def _status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def gate(case: Case) -> dict[str, str | None]:
    """For each provider None, or why its results are not correct."""
    eager, truth = case.truth()
    problems: dict[str, str | None] = {}
    for name, run in case.providers.items():
        try:
            check = close if name in case.ours else _roughly_close
            found = [check(a, e, t) for a, e, t in zip(run(), eager, truth, strict=True)]
            problems[name] = next((problem for problem in found if problem), None)
        except Exception as error:
            problems[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return problems


def _roughly_close(actual: Tensor, eager: Tensor, truth: Tensor) -> str | None:
    size = truth.norm().clamp_min(1e-12)
    error, allowed = ((x.double() - truth).norm() / size for x in (actual, eager))
    return None if error <= 3 * allowed + 1e-3 else f"off by {error:.1e} of the norm, and eager by {allowed:.1e}"


def measure(case: Case, meter: Any, rounds: int, problems: dict[str, str | None] | None = None) -> list[Result]:
    """Gate, take turns; the order rotates so that no provider always follows the same one.

    ``problems`` is the gate's verdict where it was reached before, on fewer rows.
    """
    problems = gate(case) if problems is None else problems
    results = {
        name: Result(case=case.name, provider=name, problem=problems.get(name, "not in the gate"))
        for name in case.providers
    }
    sound = [name for name, result in results.items() if result.problem is None]
    for name in list(sound):
        try:
            results[name].peak_bytes = meter.peak(case.providers[name])
        except Exception as error:  # out of memory, most likely: the others go on
            results[name].problem = f"{type(error).__name__}: {str(error)[:120]}"
            sound.remove(name)
    for k in range(rounds):
        for name in sound[k % max(len(sound), 1) :] + sound[: k % max(len(sound), 1)]:
            results[name].seconds.append(meter.time(case.providers[name]))
    for result in results.values():
        _summarise(result, case)
    base = results[case.baseline].median
    for name in sound:
        results[name].speedup = base / results[name].median if base else None
    return list(results.values())


def _summarise(result: Result, case: Case) -> None:
    if result.seconds:
        ordered = sorted(result.seconds)
        result.median = statistics.median(ordered)
        result.q20, result.q80 = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8))
        result.share_of_ceiling = case.ideal_seconds / result.median if case.ideal_seconds else None


def leaves(tensors: dict[str, Tensor], names: Sequence[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Copies of the tensors, in another floating dtype if asked, that require gradients where named."""
    out = {k: t.detach().to(dtype) if dtype and t.is_floating_point() else t.detach() for k, t in tensors.items()}
    return {k: t.clone().requires_grad_() if k in names else t for k, t in out.items()}


def logprobs_case(rows: int, vocab: int) -> Case:
    logits, targets = random_logits(rows, vocab)
    upstream = torch.linspace(-1, 1, rows), torch.linspace(0.1, 0.2, rows)
    compiled: Callable[..., Any] = torch.compile(reference.logprobs_from_logits)

    def run(op: Callable[..., Any], x: Tensor = logits, **options: Any) -> Outputs:
        x = x.detach().requires_grad_()
        out = op(x, targets, **options)
        return [*out, *torch.autograd.grad(out, x, [u.to(x.dtype) for u in upstream])]

    scratch = logits.clone()

    def in_place() -> Outputs:
        scratch.copy_(logits)
        return run(tk.logprobs_from_logits, scratch, backend="native", inplace_backward=True)

    return Case(
        name=f"logprob + entropy, forward + backward, [{rows}, {vocab}] fp32",
        baseline="eager",
        ours=("native", IN_PLACE),
        providers={
            "native": lambda: run(tk.logprobs_from_logits, backend="native"),
            IN_PLACE: in_place,
            "eager": lambda: run(reference.logprobs_from_logits),
            "torch.compile": lambda: run(compiled),
        },
        truth=lambda: (run(reference.logprobs_from_logits), run(reference.logprobs_from_logits, logits.double())),
    )


def padded_gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """The loop over padded [B, T] that trainers run: one step of Python per time step."""
    after, reversed_ = rewards.new_zeros(len(rewards)), []
    for t in reversed(range(rewards.shape[1])):
        next_values = values[:, t + 1] if t < rewards.shape[1] - 1 else 0.0
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        after = delta + gamma * lam * after
        reversed_.append(after)
    advantages = torch.stack(reversed_[::-1], dim=1)
    return advantages, advantages + values


def gae_case(sequences: int, length: int) -> Case:
    x = random_rollouts([length] * sequences)
    packed = x["rewards"], x["values"], x["cu_seqlens"]
    padded = packed[0].view(sequences, length), packed[1].view(sequences, length)
    providers: dict[str, Run] = {
        "native": lambda: tk.gae(*packed, gamma=0.99, lam=0.95, backend="native"),
        "padded loop": lambda: [t.flatten() for t in padded_gae(*padded, 0.99, 0.95)],
        "reference": lambda: tk.gae(*packed, gamma=0.99, lam=0.95, backend="reference"),
    }
    try:
        from verl.trainer.ppo.core_algos import compute_gae_advantage_return  # pyright: ignore[reportMissingImports]
    except ImportError:
        pass
    else:  # it whitens the advantages, and its time includes that; the plain ones are its returns less the values
        mask = torch.ones(sequences, length)

        def verl() -> Outputs:
            returns = compute_gae_advantage_return(*padded, mask, 0.99, 0.95)[1].flatten()
            return [returns - packed[1], returns]

        providers["verl"] = verl
    wide = packed[0].double(), packed[1].double(), packed[2]
    return Case(
        name=f"GAE, {sequences} sequences x {length}", baseline="padded loop", ours=("native", "reference"), providers=providers,
        truth=lambda: (reference.gae(*packed, gamma=0.99), reference.gae(*wide, gamma=0.99)),
    )  # fmt: skip


def ppo_case(actions: int) -> Case:
    x = random_ppo(actions)
    learned = ("logp", "entropy", "values")
    options: dict[str, Any] = {"kl_coef": 0.1, "entropy_coef": 0.01, "dual_clip": 3.0}
    compiled = torch.compile(reference.ppo_loss)

    def run(op: Callable[..., Any], dtype: torch.dtype | None = None, **extra: Any) -> Outputs:
        y = leaves(x, learned, dtype) if dtype else {k: t.detach().requires_grad_(k in learned) for k, t in x.items()}
        loss, metrics = op(**y, **options, **extra)
        return [loss, metrics["approx_kl"], *torch.autograd.grad(loss, [y[k] for k in learned])]

    return Case(
        name=f"PPO loss of every term, metrics and gradients, {actions} actions fp32", baseline="eager",
        ours=("native", "eager"),
        providers={
            "native": lambda: run(tk.ppo_loss, backend="native"),
            "eager": lambda: run(reference.ppo_loss),
            "torch.compile": lambda: run(compiled),
        },
        truth=lambda: (run(reference.ppo_loss), run(reference.ppo_loss, torch.float64)),
    )  # fmt: skip


def head_loss(logp: Tensor, entropy: Tensor, old_logp: Tensor, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return tk.ppo_loss(
        logp, old_logp, advantages, entropy=entropy, entropy_coef=0.01, normalizer=1.0, backend="reference"
    )


def head_case(actions: int, hidden_size: int, vocab: int, chunk_size: int) -> Case:
    hidden, weight, targets = random_head(actions, hidden_size, vocab)
    x = random_ppo(actions)
    with torch.no_grad():
        old = tk.linear_logprobs(hidden, weight, targets)[0] + 0.3 * torch.randn(actions)

    def run(op: Callable[..., Any], dtype: torch.dtype = torch.float32) -> Outputs:
        h, w = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
        loss = op(h, w, old.to(dtype), x["advantages"].to(dtype))
        return [loss, *torch.autograd.grad(loss, [h, w])]

    def full(h: Tensor, w: Tensor, *rows: Tensor) -> Tensor:
        return head_loss(*reference.logprobs_from_logits(h @ w.t(), targets), *rows)[0] / actions

    def three_units(h: Tensor, w: Tensor, *rows: Tensor) -> Tensor:
        return tk.linear_token_loss(h, w, targets, head_loss, rows, chunk_size=chunk_size, backend="native")[0]

    def four_units(h: Tensor, w: Tensor, *rows: Tensor) -> Tensor:
        out = tk.linear_logprobs(h, w, targets, chunk_size=chunk_size, backend="native")
        return head_loss(*out, *rows)[0] / actions

    names = f"linear_token_loss, chunks of {chunk_size} (3 units)", f"linear_logprobs, chunks of {chunk_size} (4 units)"
    return Case(
        name=f"PPO loss of a head, forward + backward, [{actions} x {hidden_size}] x {vocab} fp32", baseline="eager",
        ours=names, providers={
            names[0]: lambda: run(three_units),
            names[1]: lambda: run(four_units),
            "eager": lambda: run(full),
        },
        truth=lambda: (run(full), run(full, torch.float64)),
    )  # fmt: skip


def cases(quick: bool) -> list[Callable[[], Case]]:
    if quick:
        return [lambda: logprobs_case(16, 5003), lambda: gae_case(4, 40), lambda: ppo_case(3000),
                lambda: head_case(64, 16, 1000, 32)]  # fmt: skip
    return [lambda: logprobs_case(2048, 49_152), lambda: gae_case(64, 512), lambda: ppo_case(1_000_000),
            lambda: head_case(2048, 576, 49_152, 128)]  # fmt: skip


def commit() -> str:
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def table(report: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [f"Device: {report['device']}; torch {report['torch']}; commit {report['commit']}.", ""]
    lines += [
        "| what | provider | median | 20-80 % | speed-up | of the ceiling | peak memory |", "|---|---|---|---|---|---|---|"
    ]  # fmt: skip
    for row in report["results"]:
        if row["problem"]:
            lines.append(f"| {row['case']} | {row['provider']} | not timed: {row['problem']} | | | | |")
            continue
        speedup = f"{row['speedup']:.2f}x" if row["speedup"] else ""
        spread = f"{_seconds(row['q20'])} - {_seconds(row['q80'])}"
        share = f"{row['share_of_ceiling']:.0%}" if row["share_of_ceiling"] else ""
        lines.append(f"| {row['case']} | {row['provider']} | {_seconds(row['median'])} | {spread} | {speedup} | {share} | "
                     f"{row['peak_bytes'] / 2**20:.0f} MiB |")  # fmt: skip
    return "\n".join(lines)


def with_table(readme: str, text: str) -> str:
    """The README with the table between its marks."""
    before, rest = readme.split(SPEED_MARKS[0])
    return f"{before}{SPEED_MARKS[0]}\n{text}\n{SPEED_MARKS[1]}{rest.split(SPEED_MARKS[1])[1]}"


def _seconds(x: float) -> str:
    return f"{x:.2f} s" if x >= 1 else f"{x * 1e3:.1f} ms" if x >= 1e-3 else f"{x * 1e6:.0f} us"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: checks that everything runs")
    parser.add_argument("--only", type=int, nargs="*", help="which cases, counted from 0")
    parser.add_argument("--table", type=Path, help="print the table of an earlier JSON instead")
    parser.add_argument("--readme", type=Path, help="with --table: write it between the README's speed marks")
    options = parser.parse_args()
    if options.table:
        text = table(json.loads(options.table.read_text()))
        print(text)
        if options.readme:
            options.readme.write_text(with_table(options.readme.read_text(), text))
        return
    torch.set_num_threads(options.threads)
    chosen = cases(options.quick)
    results = []
    for k in options.only or range(len(chosen)):
        results += measure(chosen[k](), CpuMeter(), options.rounds)
    report = {
        "device": f"{_processor()}, {options.threads} threads, {native.simd()}", "torch": torch.__version__,
        "commit": commit(), "results": [asdict(r) for r in results],
    }  # fmt: skip
    print(table(report))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
