"""Every setting of ``tppo-fast reward-model``: typed, validated, torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from tppo_fast.sections import (
    TEMPLATE,
    Count,
    NonNegative,
    NotBlank,
    OfStep,
    Passes,
    PathText,
    Positive,
    Section,
    Template,
    Unit,
)


class BackboneConfig(Section):
    path: PathText = "scratch"
    """Folder of any transformers encoder or causal decoder and its fast tokenizer (safetensors), the policy's own too; or
    "scratch" for a small model that starts from nothing, with a tokenizer made from the labelled texts."""
    scratch: Literal["decoder", "encoder"] = "decoder"
    """With path "scratch": a causal Llama or a bidirectional ModernBERT of less than a million parameters. A causal one cannot
    know that a query will turn out to repeat an earlier one."""
    trust_remote_code: bool = False
    """Run Python code that ships inside the model folder. Off unless you have read that code."""


class LabelsConfig(Section):
    labels: PathText = ""
    """Labelled responses, a file that tppo-fast label wrote. Required."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the USERS on whom early stopping is decided."""
    test_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the USERS that nothing but the final metrics reads; no user stands in two parts."""
    template: Template = TEMPLATE
    """Text of the history part. {history} is replaced by the queries and must occur exactly once."""
    separator: NotBlank = ", "
    """Text between the queries of a history and of a response."""
    max_tokens: Annotated[int, Field(ge=16)] = 2048
    """Longest input; a longer one loses the oldest part of its history. Lowered to what the backbone has (TPPO: 2048)."""

    @model_validator(mode="after")
    def _something_to_train_on(self) -> LabelsConfig:
        if self.validation_fraction + self.test_fraction >= 1.0:
            raise ValueError(
                f"data.validation_fraction = {self.validation_fraction} and data.test_fraction = {self.test_fraction} "
                "leave no user to train on: lower one"
            )
        return self


class LossConfig(Section):
    local_weight: Unit = 0.4
    """Weight of the per-token cross-entropy (TPPO: 0.4, best of 0.2 to 0.8)."""
    global_weight: Unit = 0.6
    """Weight of the squared error of a response's mean soft value against its sentence label (TPPO: 0.6)."""
    class_weights: Literal["inverse", "equal"] = "inverse"
    """w_c of the cross-entropy: inverse class frequency among the training tokens (the paper does not say), or 1."""
    max_ratio: Annotated[float, Field(ge=1.0)] = 3.0
    """Relevant and irrelevant training tokens stand at most in this ratio, either way; the more frequent class is
    subsampled anew in each pass (TPPO: 3)."""


class LearnConfig(Section):
    lr: Positive | None = None
    """Peak learning rate. None: 1e-5, as TPPO for its pretrained backbone, or 1e-3 with ``backbone.path`` "scratch"."""
    warmup_share: Unit = 0.05
    """Share of the optimizer steps in which the learning rate rises to its peak; then it falls linearly to 0."""
    weight_decay: NonNegative = 0.01
    """AdamW weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this global norm."""
    batch_size: OfStep = 32
    """Responses per optimizer step (TPPO: 32 on the device, 8 times accumulated)."""
    epochs: Passes = 10
    """Most passes over the training responses."""
    microbatch_tokens: Annotated[int, Field(ge=16)] = 8192
    """Most tokens in one forward pass; changes memory, not the gradient."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between two looks at the validation users; 0: once per pass."""
    patience: Count = 3
    """Stop after this many looks in a row without a lower validation loss; the best weights are kept."""
    save_every: Annotated[int, Field(ge=0)] = 100
    """Optimizer steps between checkpoints; 0: only when interrupted and at the end."""


class RewardModelConfig(Section):
    run_dir: Path = Path("runs/reward-model")
    """Where metrics, checkpoints and the finished reward model (``run_dir/model``) go."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Decides the split, the data order, the subsampling and the initialisation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes CUDA when there is a GPU."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads for torch; 0 leaves torch's own choice."""
    resamples: Count = 1000
    """Bootstrap resamples of the intervals."""
    backbone: BackboneConfig = BackboneConfig()
    data: LabelsConfig = LabelsConfig()
    loss: LossConfig = LossConfig()
    train: LearnConfig = LearnConfig()

    @property
    def peak_lr(self) -> float:
        """``train.lr``, or what suits the backbone."""
        return self.train.lr or (1e-3 if self.backbone.path == "scratch" else 1e-5)

    @model_validator(mode="after")
    def _has_a_loss(self) -> RewardModelConfig:
        if self.loss.local_weight + self.loss.global_weight == 0.0:
            raise ValueError("loss.local_weight and loss.global_weight are both 0: nothing would be learned")
        return self
