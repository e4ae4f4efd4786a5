"""The README's examples run as they stand, and the benchmark behind its table refuses what is wrong."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
README = (ROOT / "kernels" / "README.md").read_text()
PLAIN, TRAINER = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_plain_loop_learns():
    scope: dict = {}
    exec(compile(PLAIN, "kernels/README.md", "exec"), scope)
    assert scope["metrics"]["ratio"].isfinite()
    assert scope["metrics"]["ratio"] != 40.0  # it has moved
    first = PLAIN.replace("range(4)", "range(1)")
    exec(compile(first, "kernels/README.md", "exec"), scope)
    assert scope["metrics"]["ratio"] == 40.0  # 40 actions, each ratio exactly 1
    assert scope["metrics"]["approx_kl"] == 0.0


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_subclass_trains(tmp_path):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    import transformers

    scope: dict = {}
    exec(compile(TRAINER, "kernels/README.md", "exec"), scope)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    before = model.lm_head.weight.detach().clone()
    rows = [
        {"input_ids": torch.randint(60, (9,)), "old_logp": torch.full((8,), -4.0), "advantages": torch.randn(8)}
        for _ in range(4)
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        remove_unused_columns=False, learning_rate=1e-2, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = scope["PPOTrainer"](model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert not torch.equal(before, model.lm_head.weight)
    assert trainer.ppo_metrics["ratio"].isfinite()


def test_the_benchmark_gates_and_times():
    """One that is wrong is named and not timed, one that cannot run says why, and every round has other inputs."""
    measure, op_cases = pytest.importorskip("benchmarks.measure"), pytest.importorskip("benchmarks.op_cases")
    case = op_cases.gae_case(op_cases.cpu(measure.Ceilings(copy=1.0, gemm=1.0)), 3, 10)
    seen = []

    def loop():
        out = case.providers["padded PyTorch"]()
        seen.append(out[0].clone())
        return out

    added = {"broken": lambda: [x + 1.0 for x in loop()], "absent": "it needs a GPU", "watched": loop}
    case = replace(case, providers={**case.providers, **added})
    rows = {r.provider: r for r in measure.measure(case, measure.CpuMeter(), 2)}
    assert rows["padded PyTorch"].ratio == 1.0
    assert "it disagrees" in rows["broken"].problem
    assert rows["absent"].problem == "it needs a GPU"
    assert not rows["broken"].values
    assert len(rows["tppo_fast: torch"].values) == 2
    assert not torch.equal(seen[0], seen[-1])
