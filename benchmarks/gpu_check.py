"""One command on the GPU machine: correctness first, then every op and one PPO step against peers, as a share of ceilings.

    python -m benchmarks.gpu_check --out benchmarks/results/h200/ops.json [--wheels FOLDER] [--minutes 8]
    python -m benchmarks.gpu_check --only step --part 1/2 --out ...     (half of the step's rows: for short slots)
    python -m benchmarks.gpu_check --dry                                (tiny shapes on the CPU: that this file runs)

Needs no network: peers that are missing (Liger, TRL, QuACK, CCE, verl) are installed from the wheels in FOLDER into a
temporary folder, and those that are not there are left out by name. Nothing is timed while the gate is red, and a provider
is timed only if it computes the same numbers. Exits with 1 when one of our ops fails the gate, which for ``--only step`` checks
what a step uses. It begins with the GEMM that everything else stands on. The cases are ``bench_ops.gpu_cases``, the peers in
``peers``, the step in ``gpu_step``; its result is written beside that of the ops. Both files are written anew after every case
and row, so that a machine that is taken away leaves what was measured. The step goes first: an op of a peer that puts the GPU in
an error state then costs ops alone. TRL's row and the largest of ours need an H200's memory: left out where there is less.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tppo_kernels import native

from benchmarks import machine, peers, providers, results, tables
from benchmarks.bench_ops import gpu_cases
from benchmarks.gate import check_everything, check_step
from benchmarks.measure import Case, CpuMeter, GpuMeter, Meter, ceilings, gate, measure
from benchmarks.op_cases import Place
from benchmarks.results import Options, Outcome, Result

STEP_SHARE = 0.58
"""Of the minutes: the step starts no row that would end after it, so that the ops have their time."""
STEP_NEEDS = ("pydantic", "torchao")
"""What the step's rows import that a machine with torch and transformers may lack."""


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
    parser.add_argument("--minutes", type=float, default=8.0, help="when everything must have ended")
    parser.add_argument("--part", type=part_of, default=(1, 1), help="such as 1/3: this third of the cases")
    parser.add_argument("--only", choices=("ops", "step"), help="the ops alone, or the step")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        parser.error("torch sees no GPU here: use --dry for tiny shapes on the CPU")
    started = time.monotonic()
    installed = peers.install(options.wheels)
    dry = options.dry
    absent = [name for name in STEP_NEEDS if importlib.util.find_spec(name) is None]
    if absent and options.only != "ops" and not dry:
        parser.error(f"{' and '.join(absent)} cannot be imported: make gpu-wheels, and give --wheels .whl")
    device, meter = ("cpu", CpuMeter()) if dry else ("cuda", GpuMeter())
    backend = "triton" if not dry else "reference" if native.missing() else "native"
    step_alone = options.only == "step"
    problems = check_step(device, backend) if step_alone else check_everything(device, backend, dry=dry)
    if problems:
        sys.exit("\n".join(["the gate is red, nothing is timed:", *problems]))
    gate_seconds = round(time.monotonic() - started)
    print(f"the gate is green after {gate_seconds} s", flush=True)
    size, side = (1 << 20, 128) if dry else (1 << 30, 8192)
    measured = ceilings(device, torch.bfloat16, meter, size=size, side=side)
    place = Place(device=device, dtype=torch.bfloat16, backends=(backend,), ceilings=measured)
    command = f"python -m benchmarks.gpu_check{' --dry' if dry else ''}"
    part, parts = options.part
    settings: dict[str, Any] = {
        "rounds": options.rounds, "part": f"{part}/{parts}", "ceilings": measured.description, "gate_seconds": gate_seconds,
    }  # fmt: skip
    deadline = started + 60 * options.minutes

    def keep(suite: Literal["ops", "step"], rows: Sequence[Result]) -> dict[str, Any]:
        shown = providers.chosen(suite, None if suite == "ops" else ["tppo_fast", "TRL PPO"])
        record = {"machine": machine.record(), "providers": providers.record(shown)}
        outcome = Outcome(results=rows, settings=settings)
        report = results.report(suite, command, Options(threads=torch.get_num_threads()), outcome, record)
        if options.out and rows:
            results.write(report, options.out.with_name(options.out.name.replace("ops", suite, 1)))
        return report

    rows: list[Result] = []
    if options.only != "ops":
        from benchmarks import gpu_step  # its imports may be among the wheels

        until = deadline if step_alone else started + 60 * options.minutes * STEP_SHARE
        with tempfile.TemporaryDirectory() as folder:
            rows += gpu_step.run(
                measured.gemm, Path(folder), part=part, parts=parts, deadline=until, extra_path=installed, dry=dry,
                keep=lambda found: keep("step", found),
            )  # fmt: skip
        print(tables.full(keep("step", rows)))
    if not step_alone:
        step, builds = len(rows), gpu_cases(place, dry=dry)[part - 1 :: parts]
        for number, build in enumerate(builds):
            if time.monotonic() > deadline or not _answers(device):
                settings["skipped_cases"] = len(builds) - number
                print(f"{len(builds) - number} cases were left out: the time was over, or the GPU is in an error state")
                break
            rows += _measured(build, meter, options.rounds, dry=dry)
            keep("ops", rows[step:])
        print(tables.full(keep("ops", rows[step:])))
    if any(r.problem not in (None, results.LEFT_OUT) for r in rows if r.provider.startswith("tppo_fast")):
        sys.exit("one of our rows has a problem instead of a time")


def _measured(build: Callable[[bool], Case], meter: Meter, rounds: int, *, dry: bool) -> list[Result]:
    """A case's rows; one that cannot be built or checked is one row that says why."""
    torch.compiler.reset()  # a shape of an earlier case must not make this one's dynamic
    name = "a case that could not be built"
    try:
        small = build(True)
        name = small.name
        return measure(small if dry else build(False), meter, rounds, gate(small))
    except Exception as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(f"{name}: {problem}", flush=True)
        return [Result(case=name, provider="tppo_fast", problem=problem)]


def _answers(device: str) -> bool:
    """Whether the device still works: after an error of its own, every later call fails with it."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    main()
