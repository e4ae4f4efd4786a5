"""What vLLM would be asked on a GPU; no GPU is touched."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from support import no_vllm

from tppo_fast import config
from tppo_fast.errors import UserError
from tppo_fast.rollout import build_engine, serve
from tppo_fast.rollout.publish import LiveSettings

pytestmark = pytest.mark.skipif(no_vllm() is not None, reason=str(no_vllm()))


def settings(**changes: Any) -> LiveSettings:
    values: dict[str, Any] = {
        "path": "m", "dtype": "bfloat16", "device": "cuda", "max_model_len": 64, "kv_cache_gib": None, "gpu_memory_share": 0.4,
        "sleeps": False, "eager": True, "trust_remote_code": False, "threads": 1, **changes,
    }  # fmt: skip
    return LiveSettings(**values)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The memory that each engine started with asked for."""
    from tppo_fast.rollout.vllm_engine import LiveVLLM

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(LiveVLLM, "_alive", False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
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


@pytest.mark.parametrize(
    ("dtype", "given", "expected"), [("float32", None, "ieee"), ("float32", "tf32", "tf32"), ("bfloat16", None, None)]
)
@pytest.mark.usefixtures("started")
def test_in_float32_triton_does_not_round_to_tf32(
    monkeypatch: pytest.MonkeyPatch, dtype: str, given: str | None, expected: str | None
) -> None:
    from tppo_fast.rollout.vllm_engine import LiveVLLM

    monkeypatch.setenv("TRITON_F32_DEFAULT", given or "")
    if given is None:
        monkeypatch.delenv("TRITON_F32_DEFAULT")
    LiveVLLM(settings(dtype=dtype))
    assert os.environ.get("TRITON_F32_DEFAULT") == expected
    assert serve.exact(["--dtype", dtype]) == serve.exact([f"--dtype={dtype}"]) == (dtype == "float32")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rollout": {"staleness": 1}}, r'rollout\.staleness = 1 .*wait for each other; set process = "worker"'),
        ({"vllm": {"sleep": "discard"}}, r"PYTORCH_ALLOC_CONF = 'expandable_segments:True': .*; unset it"),
    ],
)
def test_what_cannot_work_on_a_gpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, dict[str, Any]], said: str
) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    made = config.build({**values, "rollout": {"engine": "vllm", **values.get("rollout", {})}})
    with pytest.raises(UserError, match=said):
        build_engine(made, None, torch.device("cuda"))
