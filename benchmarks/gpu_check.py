"""One command on the GPU machine: correctness first, then every op and one PPO step against peers, as a share of ceilings.

    python -m benchmarks.gpu_check --out benchmarks/results/h200/ops.json [--wheels FOLDER] [--minutes 8]
    python -m benchmarks.gpu_check --part 1/3 --out ...     (a third of the cases: three calls of a few minutes)
    python -m benchmarks.gpu_check --dry                    (tiny shapes on the CPU: that this file runs)

Needs no network: peers that are missing (Liger, TRL, QuACK, CCE, verl) are installed from the wheels in FOLDER into a
temporary folder, and those that are not there are left out by name. Nothing is timed while the gate is red, and a provider
is timed only if it computes the same numbers. Exits with 1 when one of our ops fails the gate. The gate begins with the
GEMM that everything else stands on. The cases are ``bench_ops.gpu_cases``, the peers in ``peers``, the
step in ``gpu_step``; its result is written beside that of the ops.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from tppo_kernels import native

from benchmarks import machine, peers, providers, results, tables
from benchmarks.bench_ops import gpu_cases
from benchmarks.gate import check_everything
from benchmarks.measure import CpuMeter, GpuMeter, ceilings, gate, measure
from benchmarks.op_cases import Place
from benchmarks.results import Options, Outcome, Result

OPS_SHARE = 0.42
"""Of the minutes: the ops start no case after it, so that the step has its time."""


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
    installed = peers.install(options.wheels)
    dry = options.dry
    device, meter = ("cpu", CpuMeter()) if dry else ("cuda", GpuMeter())
    backend = "triton" if not dry else "reference" if native.missing() else "native"
    problems = check_everything(device, backend, dry=dry)
    if problems:
        sys.exit("\n".join(["the gate is red, nothing is timed:", *problems]))
    print(f"the gate is green after {time.monotonic() - started:.0f} s", flush=True)
    size, side = (1 << 20, 128) if dry else (1 << 30, 8192)
    measured = ceilings(device, torch.bfloat16, meter, size=size, side=side)
    place = Place(device=device, dtype=torch.bfloat16, backends=(backend,), ceilings=measured)
    rows: list[Result] = []
    skipped = 0
    part, parts = options.part
    for build in gpu_cases(place, dry=dry)[part - 1 :: parts]:
        if time.monotonic() - started > 60 * options.minutes * OPS_SHARE:
            skipped += 1
            continue
        torch.compiler.reset()  # a shape of an earlier case must not make this one's dynamic
        small = build(True)
        verdict = gate(small)
        rows += measure(small if dry else build(False), meter, options.rounds, verdict)
    settings = {"rounds": options.rounds, "part": f"{part}/{parts}", "ceilings": measured.description}
    outcome = Outcome(results=rows, settings={**settings, "skipped_cases": skipped})
    record = {"machine": machine.record(), "providers": providers.record(providers.chosen("ops", None))}
    command = f"python -m benchmarks.gpu_check{' --dry' if dry else ''}"
    report = results.report("ops", command, Options(threads=torch.get_num_threads()), outcome, record)
    print(tables.full(report))
    if skipped:
        print(f"{skipped} cases were left out: the time was over")
    if options.out:
        results.write(report, options.out)
    from benchmarks import gpu_step  # its imports may be among the wheels

    with tempfile.TemporaryDirectory() as folder:
        step = gpu_step.run(
            measured.gemm, Path(folder), part=part, parts=parts, deadline=started + 60 * options.minutes,
            extra_path=installed, dry=dry,
        )  # fmt: skip
    record["providers"] = providers.record(providers.chosen("step", ["tppo_fast", "TRL PPO"]))
    report = results.report(
        "step", command, Options(threads=torch.get_num_threads()), Outcome(results=step, settings=settings), record
    )
    print(tables.full(report))
    if options.out:
        results.write(report, options.out.with_name(options.out.name.replace("ops", "step", 1)))
    rows += step
    if any(r.problem for r in rows if r.provider.startswith("tppo_fast")):
        sys.exit("one of our ops, or our step, failed its gate")


if __name__ == "__main__":
    main()
