"""The generators' states: what a checkpoint keeps of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tppo_fast import seeding


def test_gpu_states_fit_any_number_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is written; of what an earlier version wrote for every GPU it could see, the first is taken."""
    one = torch.Generator().get_state()
    restored: list[torch.Tensor] = []

    def other_gpus(*_: Any) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: one)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [one, one])
    monkeypatch.setattr(torch.cuda, "set_rng_state", restored.append)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", other_gpus)
    state = seeding.global_state()
    assert state["cuda"] == [one.tolist()]
    for saved in (state, {**state, "cuda": [one.tolist(), one.tolist()]}):
        seeding.set_global_state(saved)
    assert len(restored) == 2
    assert all(torch.equal(s, one) for s in restored)
