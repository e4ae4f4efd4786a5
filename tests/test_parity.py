"""The rollout engine's log-probabilities against the trainer's: metrics by hand, and the gate that stops a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import config

from tppo_fast import parity
from tppo_fast.errors import EngineError


def test_the_parity_metrics_by_hand() -> None:
    engine = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    trainer_side = torch.tensor([-1.0, -2.0, -3.05, -3.8])
    got = {name: float(value) for name, value in parity.metrics(engine, trainer_side).items()}
    assert got["parity/mean"] == pytest.approx(0.0625)
    assert got["parity/max"] == pytest.approx(0.2)
    assert got["parity/share_above_0.1"] == pytest.approx(0.25)
    ratio = [1.0, 1.0, math.exp(-0.05), math.exp(0.2)]
    assert got["parity/ess"] == pytest.approx(sum(ratio) ** 2 / (4 * sum(r * r for r in ratio)), rel=1e-5)
    assert float(parity.metrics(engine, engine)["parity/ess"]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changes", "mean", "stops"),
    [
        ({}, 0.01, True),
        ({"model__dtype": "bfloat16"}, 0.01, False),
        ({"model__dtype": "bfloat16"}, 0.2, True),
        ({"rollout__parity_mean_limit": 0.1}, 0.01, False),
        ({"rollout__parity_gate": False}, 0.01, False),
        ({"rollout__staleness": 1}, 0.01, False),
        ({}, math.nan, True),
    ],
)
def test_the_gate_stops_with_one_sentence(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], mean: float, stops: bool
) -> None:
    measured = {"parity/mean": mean, "parity/max": 0.0}
    made = config(tiny_model, tmp_path / "r", **changes)
    if not stops:
        parity.check(measured, made)
        return
    with pytest.raises(EngineError, match=r"parity/mean = .* nats, at most .* is allowed") as caught:
        parity.check(measured, made)
    assert "\n" not in str(caught.value)
