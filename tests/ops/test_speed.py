"""Regressions in speed, by pytest-benchmark: our op and its baseline in each case of ``benchmarks.bench_ops``, gated.

    pytest tests/ops/test_speed.py --benchmark-enable --benchmark-autosave --benchmark-compare

In the ordinary test run benchmarks are disabled: tiny shapes, one call each, and the gate.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
from tppo_kernels import native

bench_ops = pytest.importorskip("benchmarks.bench_ops")

SIZES = {
    "logprobs": (bench_ops.logprobs_case, (16, 5003), (2048, 49_152)),
    "gae": (bench_ops.gae_case, (4, 40), (64, 512)),
    "ppo": (bench_ops.ppo_case, (3000,), (1_000_000,)),
    "head": (bench_ops.head_case, (64, 16, 1000, 32), (2048, 576, 49_152, 128)),
}


@lru_cache(maxsize=1)
def case(name: str, full: bool):
    make, tiny, real = SIZES[name]
    made = make(*(real if full else tiny))
    made.providers.pop("torch.compile", None)  # slow to start
    return made, bench_ops.gate(made)


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
@pytest.mark.parametrize(("name", "ours"), [(name, ours) for name in SIZES for ours in (True, False)])
def test_speed(benchmark, name: str, ours: bool):
    """The first provider, which is ours, or the baseline that it is compared with."""
    made, problems = case(name, benchmark.enabled)
    provider = next(iter(made.providers)) if ours else made.baseline
    benchmark.group, benchmark.name = made.name, provider
    out = benchmark(made.providers[provider])
    assert problems[provider] is None
    assert all(x.isfinite().all() for x in out)
