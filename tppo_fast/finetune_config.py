"""The settings of ``tppo-fast sft`` and ``tppo-fast dpo``, beside those they share with ``train`` (``config``). Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from tppo_fast.config import Config, RunConfig
from tppo_fast.sections import Count, NonNegative, OfStep, Positive, Section, build_section, read_toml


class LearnConfig(Section):
    """How any supervised objective is optimised."""

    batch_size: OfStep = 32
    """Examples in each step."""
    lr: Positive = 1e-5
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape after the warm-up, over all steps of the run."""
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Steps of linear learning-rate warm-up."""
    weight_decay: NonNegative = 0.0
    """AdamW weight decay."""
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """AdamW first-moment decay."""
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """AdamW second-moment decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this global norm."""
    microbatch_tokens: Annotated[int, Field(ge=16)] = 8192
    """Most tokens in one forward pass; changes memory, never the gradient."""
    select: Literal["best", "last"] = "best"
    """Which policy the run leaves: the one with the lowest held-out loss of all evaluations, or the last one."""


class SFTConfig(RunConfig):
    """A run of ``tppo-fast sft``."""

    run_dir: Path = Path("runs/sft")
    """Where metrics, checkpoints and the final model go."""
    sft: LearnConfig = LearnConfig()


class DPOSection(LearnConfig):
    lr: Positive = 1e-6
    """Peak learning rate."""
    beta: Positive = 0.1
    """Weight of staying near the reference: larger moves less."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Assumed share of pairs whose order is wrong (conservative DPO); 0 is DPO."""
    max_pairs: Count = 20_000
    """Training sessions for which the policy's own response is sampled once, as the rejected side of a pair."""


class DPOConfig(RunConfig):
    """A run of ``tppo-fast dpo``."""

    run_dir: Path = Path("runs/dpo")
    """Where metrics, checkpoints and the final model go."""
    dpo: DPOSection = DPOSection()


def read_run(path: str | Path) -> dict[str, Any]:
    """The settings of a train, sft or dpo run's TOML file, by section and name.

    Raises:
        UserError: no such file, or a setting that is unknown or wrong.
    """
    values = read_toml(path)
    kind = SFTConfig if "sft" in values else DPOConfig if "dpo" in values else Config
    return build_section(values, kind).model_dump()
