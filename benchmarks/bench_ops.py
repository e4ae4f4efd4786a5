"""The fused ops against eager torch, torch.compile and independent implementations: ``python -m benchmarks --suite ops``.

Every provider passes the correctness gate on the very inputs' shapes before it is timed, see ``measure``. Sizes are swept one at
a time: tokens, vocabulary, sequence length, sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks import providers
from benchmarks.head_cases import cross_entropy_case, head_case, live_rows_case
from benchmarks.measure import Case, CpuMeter, ceilings, measure
from benchmarks.op_cases import Place, cpu, gae_case, ppo_case, rows_case
from benchmarks.results import Options, Outcome, Result

ROUNDS = 5
SMOLLM2 = {"hidden": 576, "vocabulary": 49_152}


def cases(place: Place, *, quick: bool) -> list[Callable[[], Case]]:
    """What a CPU runs in minutes: the head of SmolLM2-135M, and each size below and above."""
    if quick:
        return [
            partial(rows_case, place, 16, 5003, backward=True), partial(gae_case, place, 4, 40), partial(ppo_case, place, 3000),
            partial(head_case, place, 64, 16, 1000, entropy=True), partial(head_case, place, 64, 16, 1000, entropy=False),
            partial(cross_entropy_case, place, 64, 16, 1000),
        ]  # fmt: skip
    d, v = SMOLLM2["hidden"], SMOLLM2["vocabulary"]
    logits = [(256, v), (64, v), (512, v), (256, 16_384), (256, 98_304)]
    gaes = [(64, 512), (64, 128), (64, 2048), (16, 512), (256, 512)]
    return [
        *(partial(rows_case, place, *size, backward=True) for size in logits),
        *(partial(gae_case, place, *size) for size in gaes),
        *(partial(ppo_case, place, tokens) for tokens in (100_000, 10_000, 1_000_000)),
        *(partial(head_case, place, tokens, d, vocab, entropy=True) for tokens, vocab in logits),
        partial(head_case, place, 256, d, v, entropy=False),
        partial(cross_entropy_case, place, 256, d, v),
    ]


Builder = Callable[[bool], Case]
"""small -> the case: with few rows for the gate, or in full."""


def gpu_cases(place: Place, *, dry: bool) -> list[Builder]:
    """What a GPU runs: heads of real models, and up to a million tokens."""
    heads = [(16, 300)] if dry else [(2048, 151_936), (4096, 128_256)]
    full_rows = 32 if dry else 16_384
    segments = [(4, 512), (1, 2000)] if dry else [(2048, 512), (64, 16_384), (1, 1 << 20)]
    (d, v), tokens = heads[0], 5000 if dry else 1 << 20

    def rows(small: bool) -> int:
        return min(64, full_rows) if small else full_rows

    def head(case: Callable[..., Case], d: int, v: int, **options: Any) -> Builder:
        return lambda small: case(place, 4 * rows(True) if small else full_rows, d, v, **options)

    plan: list[Builder] = [lambda small, b=b: rows_case(place, rows(small), v, backward=b) for b in (False, True)]
    plan += [
        lambda small, n=n, t=t: gae_case(place, min(n, 2) if small else n, min(t, 3000) if small else t)
        for n, t in segments
    ]
    plan += [lambda small: ppo_case(place, 5000 if small else tokens)]
    plan += [head(head_case, d, v, entropy=entropy) for entropy in (True, False)]
    plan += [head(cross_entropy_case, d, v), *(head(live_rows_case, d, v, live=share) for share in (0.1, 0.5, 1.0))]
    return [*plan, *(head(head_case, *size, entropy=True) for size in heads[1:])]


def run(options: Options) -> Outcome:
    """The suite on this CPU."""
    torch.set_num_threads(options.threads)
    meter, rounds = CpuMeter(), options.rounds or (1 if options.quick else ROUNDS)
    place = cpu(
        ceilings(
            "cpu", torch.float32, meter, size=1 << (20 if options.quick else 28), side=128 if options.quick else 2048
        )
    )
    found: list[Result] = []
    for build in cases(place, quick=options.quick):
        torch.compiler.reset()  # a shape of an earlier case must not make this one's dynamic
        case = kept(build(), options.providers)
        print(f"ops: {case.name}", flush=True)
        found += measure(case, meter, rounds, seed=options.seed)
    return Outcome(results=found, settings={"rounds": rounds, "ceilings": place.ceilings.description})


def kept(case: Case, names: Sequence[str] | None) -> Case:
    """The case with the providers of these names alone, ours and its baseline always among them."""
    if names is None:
        return case
    chosen = {p.name for p in providers.chosen("ops", names)} | {"tppo_fast"}
    return replace(
        case, providers={n: run for n, run in case.providers.items() if n == case.baseline or n.split(":")[0] in chosen}
    )
