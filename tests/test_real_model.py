"""The real pretrained model: aligned rewards, exact log-probabilities, training steps, a checkpoint plain transformers loads.

Sessions come from the embedded generator, or from the file named by TPPO_TEST_SESSIONS.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import real_model
import torch
import transformers

from tppo_fast import config as settings
from tppo_fast import trainer
from tppo_fast.metrics import read_metrics

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(real_model.missing() is not None, reason=str(real_model.missing())),
]
STEPS = int(os.environ.get("TPPO_TEST_STEPS", "2"))
CACHE = Path(__file__).parents[1] / ".cache"


@pytest.fixture(scope="module")
def smollm2() -> Path:
    CACHE.mkdir(exist_ok=True)
    return real_model.convert(CACHE / "smollm2")


@pytest.fixture(scope="module")
def run_dir(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "run"
    trainer.train(
        settings.build(
            {
                "run_dir": str(folder),
                "threads": 1,
                "model": {"path": str(smollm2), "shared_body": True},
                "data": {
                    "train": os.environ.get("TPPO_TEST_SESSIONS", "synthetic"),
                    "synthetic_sessions": 40,
                    "max_prompt_tokens": 96,
                },
                "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 16},
                "ppo": {"lr": 1e-5, "epochs": 1},
                "train": {"steps": STEPS, "eval_every": 0, "eval_prompts": 2, "save_every": 0, "tensorboard": False},
            }
        )
    )
    return folder


def test_steps_run_and_the_engine_agrees(run_dir: Path) -> None:
    rows = [row for row in read_metrics(run_dir) if row["step"] > 0]
    assert len(rows) == STEPS
    for row in rows:
        assert row["parity/max"] < 1e-3
        assert row["ppo/ratio"] == pytest.approx(1.0, abs=1e-3)
        assert row["ppo/grad_norm"] > 0.0


def test_the_policy_loads_in_plain_transformers_and_has_moved(run_dir: Path, smollm2: Path) -> None:
    trained = transformers.AutoModelForCausalLM.from_pretrained(run_dir / "policy")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run_dir / "policy")
    ids = tokenizer("History:\nlisbon\nNext queries:", return_tensors="pt").input_ids
    with torch.no_grad():
        after = trained(ids).logits
        before = transformers.AutoModelForCausalLM.from_pretrained(smollm2)(ids).logits
    assert torch.isfinite(after).all()
    assert 0.0 < (after - before).abs().max() < 10.0
