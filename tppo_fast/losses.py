"""Loss functions over packed actions. A loss returns sums; ``ppo.update`` divides once by the step's action count.

A loss whose rows do not need each other (each action's term reads that action alone) is marked ``@row_local``. It is then
called on some rows at a time and the head costs three GEMMs of its size instead of four, with no logits kept. A loss that
is not marked (one that whitens by the new log-probabilities, say, or takes a sequence's ratio) sees the whole microbatch
at once, ``final_values`` and ``rollouts`` included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import tppo_kernels as tk
from torch import Tensor

from tppo_fast.config import PPOConfig
from tppo_fast.data_types import LossOutput, TrainRows
from tppo_fast.errors import UserError
from tppo_fast.model import Outputs

LossFunction = Callable[[Any, Any, PPOConfig, float, bool], LossOutput]
"""(evaluation, batch, config, kl_coef, train_policy) -> LossOutput; (Outputs, TrainRows, ...) when row-local, else
(Evaluation, TrainBatch, ...), which have all that those have."""
Loss = TypeVar("Loss", bound=LossFunction)
RESERVED = ("actions", "loss", "grad_norm", "critic_grad_norm", "bad")
"""Names that a loss function's own metrics cannot have."""


def row_local(loss: Loss) -> Loss:
    """Declare that each action's term reads that action's row alone, so that the loss may be called on some rows at a time."""
    loss.row_local = True  # type: ignore[attr-defined]
    return loss


def is_row_local(loss: LossFunction) -> bool:
    """Whether ``row_local`` was declared."""
    return getattr(loss, "row_local", False)


@row_local
def ppo(evaluation: Outputs, batch: TrainRows, config: PPOConfig, kl_coef: float, train_policy: bool) -> LossOutput:
    """Clipped PPO with the configured value, KL and entropy terms: ``tppo_kernels.ppo_loss``, undivided.

    Without ``value_coef`` there is no value term: algorithms without a critic come with 0.
    With ``train_policy`` False (value warm-up) only the value term has a gradient.
    """
    kl_in_loss = config.kl_placement == "loss" and train_policy
    loss, metrics = tk.ppo_loss(
        evaluation.logprobs,
        batch.old_logprobs,
        batch.advantages,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        weights=batch.importance_weights,
        ref_logp=batch.ref_logprobs,
        kl_coef=kl_coef if kl_in_loss else 0.0,
        kl_estimator=config.kl_estimator,
        entropy=evaluation.entropy,
        entropy_coef=config.entropy_coef if train_policy else 0.0,
        values=evaluation.values if config.value_coef else None,
        old_values=batch.values,
        returns=batch.returns,
        value_coef=config.value_coef,
        value_clip=config.value_clip,
        normalizer=1.0,
    )
    if not config.value_coef:
        metrics = {name: value for name, value in metrics.items() if not name.startswith("value_")}
    return LossOutput(loss=loss, metrics=metrics)


def checked(out: Any, name: str) -> LossOutput:
    """What a loss function returned.

    Raises:
        UserError: it is no LossOutput of a sum and of sums.
    """
    if not isinstance(out, LossOutput):
        raise UserError(f"{name} returned a {type(out).__name__}: it must return a LossOutput")
    if not isinstance(out.loss, Tensor) or out.loss.dim():
        shape = (
            f"of shape {list(out.loss.shape)}"
            if isinstance(out.loss, Tensor)
            else f"that is a {type(out.loss).__name__}"
        )
        raise UserError(f"{name} returned a loss {shape}: return the sum over its actions, a tensor without axes")
    if not isinstance(out.metrics, Mapping):
        raise UserError(
            f"{name} returned metrics that are a {type(out.metrics).__name__}: return a dict, {{}} for none"
        )
    for metric, value in out.metrics.items():
        if metric in RESERVED or not isinstance(value, Tensor) or value.dim():
            given = f"of shape {list(value.shape)}" if isinstance(value, Tensor) else f"= {value!r}"
            raise UserError(
                f"{name} has a metric {metric!r} {given}: give a tensor without axes, the sum over its actions, under a name "
                f"other than {', '.join(RESERVED)}"
            )
    return out


BUILT_IN: dict[str, LossFunction] = {"ppo": ppo}
