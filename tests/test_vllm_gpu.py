"""What vLLM would be asked on a GPU; no GPU is touched."""

from __future__ import annotations

from typing import Any

import pytest
from support import no_vllm

from tppo_fast.rollout.publish import LiveSettings

pytestmark = pytest.mark.skipif(no_vllm() is not None, reason=str(no_vllm()))


def settings(**changes: Any) -> LiveSettings:
    values: dict[str, Any] = {
        "path": "m", "dtype": "bfloat16", "device": "cuda", "max_model_len": 64, "kv_cache_gib": None, "gpu_memory_share": 0.4,
        "sleep_level": 0, "eager": True, "trust_remote_code": False, "threads": 1, **changes,
    }  # fmt: skip
    return LiveSettings(**values)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The memory that each engine started with asked for."""
    from tppo_fast.rollout.vllm_engine import LiveVLLM

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(LiveVLLM, "_alive", False)
    monkeypatch.setattr(LiveVLLM, "_start", staticmethod(lambda _, memory: asked.append(memory)))
    return asked


@pytest.mark.parametrize(
    ("cache", "expected"),
    [
        (None, {"gpu_memory_utilization": 0.4}),
        (2.0, {"gpu_memory_utilization": 0.01, "kv_cache_memory_bytes": 2 << 30}),
    ],
)
def test_with_a_cache_of_given_size_no_share_of_the_gpu_must_be_free(
    started: list[dict[str, Any]], cache: float | None, expected: dict[str, Any]
) -> None:
    from tppo_fast.rollout.vllm_engine import LiveVLLM

    LiveVLLM(settings(kv_cache_gib=cache))
    assert started == [expected]
