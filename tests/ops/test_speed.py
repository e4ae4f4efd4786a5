"""Regressions in speed, by pytest-benchmark: our op and its baseline in each of the benchmark's ops, gated.

    pytest tests/ops/test_speed.py --benchmark-enable --benchmark-autosave --benchmark-compare

In the ordinary test run benchmarks are disabled: tiny shapes, one call each, and the gate.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial

import pytest
import torch
from tppo_kernels import native

measure = pytest.importorskip("benchmarks.measure")
op_cases = pytest.importorskip("benchmarks.op_cases")
head_cases = pytest.importorskip("benchmarks.head_cases")

CPU = op_cases.cpu(measure.Ceilings(copy=1.0, gemm=1.0))
SIZES = {
    "logprobs": (partial(op_cases.rows_case, CPU, backward=True), (16, 5003), (2048, 49_152)),
    "gae": (partial(op_cases.gae_case, CPU), (4, 40), (64, 512)),
    "ppo": (partial(op_cases.ppo_case, CPU), (3000,), (1_000_000,)),
    "head": (partial(head_cases.head_case, CPU, entropy=True), (64, 16, 1000), (2048, 576, 49_152)),
}


@lru_cache(maxsize=1)
def case(name: str, full: bool):
    """The case, its two providers that are timed, and what is wrong with either."""
    make, tiny, real = SIZES[name]
    made = make(*(real if full else tiny))
    runs = {"ours": next(iter(made.runs.items())), "baseline": (made.baseline, made.runs[made.baseline])}
    made = replace(made, providers=dict(runs.values()))
    return made, runs, measure.gate(made)


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
@pytest.mark.parametrize(("name", "whose"), [(name, whose) for name in SIZES for whose in ("ours", "baseline")])
def test_speed(benchmark, name: str, whose: str):
    """The first provider, which is ours, or the baseline that it is compared with."""
    made, runs, problems = case(name, benchmark.enabled)
    provider, run = runs[whose]
    benchmark.group, benchmark.name = made.name, provider
    out = benchmark(run)
    assert problems[provider] is None
    assert all(isinstance(x, torch.Tensor) and x.isfinite().all() for x in out)
