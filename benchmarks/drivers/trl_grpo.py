"""Whole iterations of TRL's current GRPO trainer on the prompts of a request: no critic, no reference (its default, beta 0).

Its end-of-sequence token is forbidden, so that responses have one length. Its loss is the mean over the microbatch's tokens.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}

import ruler  # pyright: ignore[reportMissingImports]
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

ruler.hide_vllm_from_trl()

from trl.trainer.grpo_config import GRPOConfig  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402


class Watched(GRPOTrainer):
    """The trainer with prompts given as ids, and its phases told apart."""

    def __init__(self, prompts: list[list[int]], *args: Any, **kwargs: Any) -> None:
        self.prompts, self.watch, self.sampled = prompts, ruler.Stopwatch(), []
        super().__init__(*args, **kwargs)

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[Any, ...]:
        return [self.prompts[int(p)] for p in prompts], None, {}

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._generate_single_turn(*args, **kwargs)
        self.watch.mark("rollout")
        return found

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        found = super()._generate_and_score_completions(inputs)
        self.watch.mark("prepare")
        return found


class Iterations(TrainerCallback):
    """An iteration is as many optimizer steps as there are epochs."""

    def __init__(self, watch: Any, epochs: int) -> None:
        self.watch, self.epochs = watch, epochs

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.watch.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, control
        if state.global_step % self.epochs == 0:
            self.watch.end()
            self.watch.begin()


def arguments(request: dict[str, Any], sequences: int, folder: str) -> GRPOConfig:
    return GRPOConfig(
        output_dir=folder, report_to=[], save_strategy="no", disable_tqdm=True, seed=0, logging_steps=1,
        use_cpu=not torch.cuda.is_available(), bf16=request["bfloat16"], gradient_checkpointing=False,
        max_steps=request["epochs"] * request["iterations"], num_iterations=request["epochs"],
        per_device_train_batch_size=request["microbatch"], gradient_accumulation_steps=sequences // request["microbatch"],
        num_generations=request["samples"], max_completion_length=request["new_tokens"], temperature=1.0,
        generation_kwargs={"min_new_tokens": request["new_tokens"]}, beta=0.0, epsilon=request["clip"], loss_type="bnpo",
        learning_rate=request["lr"], lr_scheduler_type="constant", adam_beta2=request["adam_beta2"], weight_decay=0.0,
        max_grad_norm=0.0,
    )  # fmt: skip


def main(folder: Path) -> None:
    request, tensors = ruler.read(folder)
    torch.manual_seed(0)
    base = ruler.peak_gib()
    path, prompts = request["model"], tensors["prompts"].tolist()
    sampled: list[torch.Tensor] = []

    def scored(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        rows = [[*trainer.prompts[int(p)], *ids] for p, ids in zip(prompts, completion_ids, strict=True)]
        sampled.append(torch.tensor(rows))
        return ruler.even_share(torch.tensor(completion_ids)).tolist()

    with tempfile.TemporaryDirectory() as scratch:
        trainer = Watched(
            prompts, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), scored,
            args=arguments(request, len(prompts) * request["samples"], scratch),
            train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(len(prompts))] * request["iterations"]}),
            processing_class=AutoTokenizer.from_pretrained(path, padding_side="left"),
        )  # fmt: skip
        trainer.add_callback(Iterations(trainer.watch, request["epochs"]))
        trainer.train()
    steps = [row for row in trainer.state.log_history if "entropy" in row]
    rewards = [row["reward"] for row in steps if "reward" in row]  # logged with the step that sampled
    metrics = []
    for i, reward in enumerate(rewards):
        entropies = [row["entropy"] for row in steps[i * request["epochs"] : (i + 1) * request["epochs"]]]
        metrics.append({"reward": reward, "entropy": sum(entropies) / len(entropies)})
    ruler.write(
        folder, {"iterations": trainer.watch.iterations, "metrics": metrics, "base_gib": base},
        {"sequences": torch.stack(sampled), **ruler.final_logprobs(trainer.model, sampled[-1], request)},
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
