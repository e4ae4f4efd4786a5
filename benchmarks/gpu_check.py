"""One command on the GPU machine: correctness first, then every op against its peers, as a share of measured ceilings.

    python -m benchmarks.gpu_check --out benchmarks/results/h200/ops.json [--wheels FOLDER] [--minutes 8]
    python -m benchmarks.gpu_check --part 1/3 --out ...     (a third of the cases: three calls of a few minutes)
    python -m benchmarks.gpu_check --dry                    (tiny shapes on the CPU: that this file runs)

Needs no network: peers that are missing (Liger, TRL, QuACK, CCE, verl) are installed from the wheels in FOLDER into a
temporary folder, and those that are not there are left out by name. Nothing is timed while the gate is red, and a provider
is timed only if it computes the same numbers. Exits with 1 when one of our ops fails the gate. The gate begins with the
GEMM that everything else stands on. The cases are in ``gpu_cases``, the peers in ``peers``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.bench_ops import CpuMeter, Result, Run, commit, gate, measure, table
from benchmarks.gate import check_everything
from benchmarks.gpu_cases import plan


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


def part_of(text: str) -> tuple[int, int]:
    """ "2/3" -> (2, 3)."""
    try:
        part, parts = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give part/parts, such as 1/3") from None
    if not 1 <= part <= parts:
        raise argparse.ArgumentTypeError(f"{text!r}: the part must be between 1 and {parts}")
    return part, parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--wheels", type=Path, help="a folder of peers' wheels")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--minutes", type=float, default=8.0, help="no case starts after this")
    parser.add_argument("--part", type=part_of, default=(1, 1), help="such as 1/3: this third of the cases")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        parser.error("torch sees no GPU here: use --dry for tiny shapes on the CPU")
    started = time.monotonic()
    peers.install(options.wheels)
    device, backend, meter = ("cpu", None, CpuMeter()) if options.dry else ("cuda", "triton", GpuMeter())
    problems = check_everything(device, backend, dry=options.dry)
    if problems:
        sys.exit("\n".join(["the gate is red, nothing is timed:", *problems]))
    print(f"the gate is green after {time.monotonic() - started:.0f} s", flush=True)
    copy, gemm = ceilings(device, meter, dry=options.dry)
    results: list[Result] = []
    skipped = 0
    part, parts = options.part
    for build in plan(device, backend, copy, gemm, dry=options.dry)[part - 1 :: parts]:
        if time.monotonic() - started > 60 * options.minutes:
            skipped += 1
            continue
        small = build(True)
        verdict = gate(small)
        results += measure(small if options.dry else build(False), meter, options.rounds, verdict)
    report = {
        "device": f"{'CPU, dry' if options.dry else torch.cuda.get_device_name()}, copy {copy / 1e12:.2f} TB/s, bf16 GEMM "
        f"{gemm / 1e12:.0f} TFLOP/s", "torch": torch.__version__, "commit": commit(), "skipped_cases": skipped,
        "part": f"{part}/{parts}", "results": [asdict(r) for r in results],
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
