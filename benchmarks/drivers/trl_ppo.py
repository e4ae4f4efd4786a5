"""Whole iterations of TRL's PPO trainer (1.12.0, the last release that has one) on the prompts of a request.

The trainer is TRL's own, from dataloader to optimizer; its generation and its first backward pass are watched to tell the phases
apart. Its policy, critic and reference are three bodies, as it asks for. Responses have one length, since it is told of no
stop token. Gradients are not clipped, which it never does.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}

import ruler  # pyright: ignore[reportMissingImports]
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

ruler.hide_vllm_from_trl()

from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # noqa: E402


class Reward(nn.Module):
    """The reward in the shape of a reward model: TRL reads a score off the last position."""

    base_model_prefix = "backbone"

    def __init__(self, prompt_tokens: int) -> None:
        super().__init__()
        self.prompt_tokens = prompt_tokens
        self.score = nn.Identity()

    def backbone(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        paid = ruler.even_share(input_ids[:, self.prompt_tokens :])
        return SimpleNamespace(hidden_states=[paid[:, None, None].expand(*input_ids.shape, 1)])


class Iterations(TrainerCallback):
    """TRL says when training begins and an iteration ends."""

    def __init__(self, watch: Any) -> None:
        self.watch = watch

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.watch.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.watch.end()
        self.watch.begin()


def arguments(request: dict[str, Any], sequences: int, folder: str) -> PPOConfig:
    gpu = torch.cuda.is_available()
    return PPOConfig(
        output_dir=folder, report_to=[], save_strategy="no", disable_tqdm=True, seed=0, use_cpu=not gpu,
        bf16=request["bfloat16"], gradient_checkpointing=False,  # its own training loop never turns it on
        total_episodes=sequences * request["iterations"], num_ppo_epochs=request["epochs"], num_mini_batches=1,
        per_device_train_batch_size=request["microbatch"], gradient_accumulation_steps=sequences // request["microbatch"],
        response_length=request["new_tokens"], stop_token=None, temperature=1.0, num_sample_generations=0,
        local_rollout_forward_batch_size=min(64, sequences),
        learning_rate=request["lr"], lr_scheduler_type="constant", adam_beta2=request["adam_beta2"], weight_decay=0.0,
        kl_coef=request["kl_coef"], gamma=request["gamma"], lam=request["lam"], cliprange=request["clip"],
        cliprange_value=request["clip"], vf_coef=request["value_coef"],
    )  # fmt: skip


def build(request: dict[str, Any], tensors: dict[str, torch.Tensor], folder: str) -> PPOTrainer:
    path, prompts = request["model"], tensors["prompts"]
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # an id that nobody samples, as in TRL's own examples
    policy, reference = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for _ in range(2))
    value = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
    with torch.no_grad():
        value.score.weight.copy_(tensors["value_head"][None])
    if request["bfloat16"]:
        reference = reference.bfloat16()
    rows = [row for row in prompts.tolist() for _ in range(request["samples"])]
    # At a dataset's last batch accelerate ends gradient accumulation at every microbatch: that batch is never reached here.
    spare = request["iterations"] + 1
    return PPOTrainer(
        args=arguments(request, len(rows), folder), processing_class=tokenizer, model=policy, ref_model=reference,
        reward_model=Reward(prompts.shape[1]),  # pyright: ignore[reportArgumentType]
        value_model=value, eval_dataset=Dataset.from_dict({"input_ids": rows[:1]}),
        train_dataset=Dataset.from_dict({"input_ids": rows * spare}),
    )  # fmt: skip


def watched(trainer: PPOTrainer) -> tuple[Any, list[torch.Tensor]]:
    """(the phases' stopwatch, what was generated in each iteration)."""
    watch, sampled = ruler.Stopwatch(), []
    generate, accumulate = ppo_trainer.batch_generation, trainer.accelerator.accumulate

    def generation(*args: Any, **kwargs: Any) -> Any:
        found = generate(*args, **kwargs)
        watch.mark("rollout")
        sampled.append(found[0])
        return found

    def accumulation(*args: Any, **kwargs: Any) -> Any:
        watch.mark("prepare")
        return accumulate(*args, **kwargs)

    ppo_trainer.batch_generation, trainer.accelerator.accumulate = generation, accumulation
    trainer.add_callback(Iterations(watch))
    return watch, sampled


def main(folder: Path) -> None:
    request, tensors = ruler.read(folder)
    torch.manual_seed(0)
    base = ruler.peak_gib()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build(request, tensors, scratch)
        watch, sampled = watched(trainer)
        trainer.train()
    width = tensors["prompts"].shape[1] + request["new_tokens"]
    if any(rows.shape[1] != width for rows in sampled):
        raise RuntimeError(f"responses of other lengths than {request['new_tokens']} tokens were sampled")
    logged = [row for row in trainer.state.log_history if "loss/policy_avg" in row]
    metrics = [
        {
            "reward": row["objective/scores"], "kl": row["objective/kl"] / request["new_tokens"],
            "policy_loss": row["loss/policy_avg"], "value_loss": row["loss/value_avg"],
            "entropy": row["policy/entropy_avg"], "approx_kl": row["policy/approxkl_avg"],
        }
        for row in logged
    ]  # fmt: skip
    ruler.write(
        folder, {"iterations": watch.iterations, "metrics": metrics, "base_gib": base},
        {"sequences": torch.stack(sampled), **ruler.final_logprobs(trainer.policy_model, sampled[-1], request)},
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
