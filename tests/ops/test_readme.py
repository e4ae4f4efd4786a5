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


def language_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def responses(lengths, width=9, prompt=3):
    """Rows of [T] padded on the right, with a prompt of 3 tokens."""
    g, rows = torch.Generator().manual_seed(0), []
    for length in lengths:
        at, tokens = torch.arange(width), torch.randint(60, (width,), generator=g)
        rows.append({
            "input_ids": tokens, "attention_mask": (at < length).long(),
            "labels": tokens.masked_fill((at < prompt) | (at >= length), -100),
            "old_logp": torch.full((width,), -4.0), "advantages": torch.randn(width, generator=g),
        })  # fmt: skip
    return rows


@pytest.fixture
def trainer_scope():
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    scope: dict = {}
    exec(compile(TRAINER, "kernels/README.md", "exec"), scope)
    return scope


def test_the_wrapped_model_counts_sampled_tokens_alone(trainer_scope):
    """Neither the prompt's tokens nor padding change loss or gradients."""
    rows, found = responses([6, 9]), []
    for changed in (False, True):
        model = trainer_scope["WithLoss"](language_model())
        batch = {k: torch.stack([row[k] for row in rows]) for k in rows[0]}
        if changed:
            outside = batch["labels"] == -100
            batch["old_logp"][outside], batch["advantages"][outside] = 1e9, 1e9
            batch["input_ids"][0, 6:] = 1
        model(**batch)["loss"].backward()
        assert model.metrics["ratio"].isfinite()
        found.append(model.lm.lm_head.weight.grad)
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_divides_by_the_steps_tokens(trainer_scope, tmp_path):
    """Two accumulated microbatches of unequal length train as one batch of both."""
    import transformers

    weights = []
    for size in (1, 2):
        lm = language_model()
        before = lm.lm_head.weight.detach().clone()
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=2 // size,
            report_to=[], use_cpu=True, remove_unused_columns=False, learning_rate=1e-2, save_strategy="no",
            disable_tqdm=True, optim="sgd", max_grad_norm=0.0,
        )  # fmt: skip
        trainer_scope["trainer"](lm, args=arguments, train_dataset=responses([5, 9, 7, 4])).train()
        assert not torch.equal(before, lm.lm_head.weight)
        weights.append(lm.lm_head.weight.detach())
    torch.testing.assert_close(*weights)


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
