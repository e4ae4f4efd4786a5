"""Shared fixtures: one thread, and a tiny real model with a real tokenizer, made once."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from support import tiny_llama, wide_llama, write_model

torch.set_num_threads(1)

# The files that take longest go first, so that both workers end together.
LONGEST = (
    "test_vllm_worker",
    "test_planner",
    "test_benchmarks",
    "test_triton_interpreter",
    "test_vllm_server",
    "test_triton_aot",
    "test_trainer",
    "test_bench_step",
    "test_vllm",
    "test_job_process",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama and a byte-level BPE tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_model(folder, tiny_llama)
    return folder


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that vLLM can run, with tied embeddings."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    write_model(folder, wide_llama)
    return folder
