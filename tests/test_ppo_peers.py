"""One whole PPO step on fixed rollouts against verl and TRL: rewards with KL, GAE, whitening, both clipped losses, gradients.

The peers get padded grids of log-probabilities and values that the model's own eager pass computes, one sequence at a time: no
line of packing, attention or ops is shared with ours. Where they differ by design:

- verl and TRL whiten with the UNBIASED variance and add 1e-8 to it, as ours does.
- TRL's value loss also counts the state after each response (its ``padding_mask_p1``); here both get the same mask.
- TRL's and verl's clip is symmetric and their losses are means over tokens, as ours by default. Neither bootstraps.
- verl always has a dual clip (3 by default): it gets a bound that no ratio reaches.
- TRL has no function for GAE and its losses: they stand inside its train loop, and are restated here between its functions.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import hide_vllm_from_trl
from test_ppo import build
from torch import Tensor

from tppo_fast import packing
from tppo_fast.data_types import RolloutBatch
from tppo_fast.model import Actor, ActorCritic

GAMMA, LAM, CLIP, KL, VALUE = 0.97, 0.9, 0.2, 0.3, 0.5


def grid(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def eager_logprobs(actor: Actor, batch: RolloutBatch, select: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """[B, T], each sequence by the model's own pass."""
    rows = []
    for before, response in zip(packing.prompts(batch), packing.responses(batch), strict=True):
        logits = actor.lm(input_ids=torch.tensor([before + response]), use_cache=False).logits[0, len(before) - 1 : -1]
        rows.append(select(logits.float(), torch.tensor(response)))
    return grid(rows)


def eager_values(model: ActorCritic, batch: RolloutBatch) -> Tensor:
    rows = []
    for before, response in zip(packing.prompts(batch), packing.responses(batch), strict=True):
        assert model.critic.body is not None
        out = model.critic.body(input_ids=torch.tensor([before + response]), use_cache=False).last_hidden_state[0]
        rows.append(model.critic.value_head(out[len(before) - 1 : -1]).squeeze(-1))
    return grid(rows)


def moved(model: torch.nn.Module, seed: int, size: float = 0.02) -> None:
    """A step away, so that policy, old policy and reference are three."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=g))


def peer(module: str) -> Any:
    pytest.importorskip(module.split(".")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if module.startswith("trl"):
            hide_vllm_from_trl()
        try:
            return importlib.import_module(module)
        except ImportError as error:
            pytest.skip(f"{module}: {error}")


def verl_advantages(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return peer("verl.trainer.ppo.core_algos").compute_gae_advantage_return(rewards, values, mask, GAMMA, LAM)


def verl_loss(
    logp: Tensor, old: Tensor, advantages: Tensor, v: Tensor, v_old: Tensor, ret: Tensor, mask: Tensor
) -> Tensor:
    algos = peer("verl.trainer.ppo.core_algos")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # verl deprecates the function in favour of one that needs its configuration
        policy = algos.compute_policy_loss(old, logp, advantages, mask, cliprange=CLIP, clip_ratio_c=1e6)[0]
    value = algos.compute_value_loss(v, ret, v_old, mask, cliprange_value=CLIP)[0]
    return policy + VALUE * value


def trl_advantages(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    trl = peer("trl.experimental.ppo.ppo_trainer")
    last, out = torch.zeros(len(rewards)), []
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros(len(rewards))
        last = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * last
        out.append(last)
    advantages = torch.stack(out[::-1], 1)
    return trl.masked_whiten(advantages, mask.bool()), advantages + values


def trl_loss(
    logp: Tensor, old: Tensor, advantages: Tensor, v: Tensor, v_old: Tensor, ret: Tensor, mask: Tensor
) -> Tensor:
    trl = peer("trl.experimental.ppo.ppo_trainer")
    ratio = (logp - old).exp()
    policy = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP))
    near = torch.clamp(v, v_old - CLIP, v_old + CLIP)
    value = torch.max((v - ret).square(), (near - ret).square())
    return trl.masked_mean(policy, mask.bool()) + VALUE * 0.5 * trl.masked_mean(value, mask.bool())


@pytest.mark.parametrize(
    ("estimate", "loss"), [(verl_advantages, verl_loss), (trl_advantages, trl_loss)], ids=["verl", "trl"]
)
@pytest.mark.parametrize("share", [False, True], ids=["plain", "shared-prompts"])
def test_a_whole_step_equals_the_peers(estimate: Any, loss: Any, share: bool) -> None:
    ppo, batch = build(
        n=2,
        share=share,
        gamma=GAMMA,
        lam=LAM,
        kl_coef=KL,
        clip_low=CLIP,
        clip_high=CLIP,
        value_clip=CLIP,
        value_coef=VALUE,
    )
    select = peer("trl.trainer.utils").selective_log_softmax
    model, reference = ppo.model, ppo.reference
    assert reference is not None
    moved(model, 0)
    train, _ = ppo.prepare(batch)
    first = model.state_dict()
    first = {name: tensor.clone() for name, tensor in first.items()}
    moved(model, 1, 0.08)
    sums, _ = ppo._accumulate_gradient(train, list(range(batch.num_sequences)), True)
    mine = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    second = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.zero_grad()

    for lm in (model.actor.lm, model.critic.body, reference.lm):
        lm.set_attn_implementation("eager")
    lengths = batch.cu_actions.diff().tolist()
    mask = grid([torch.ones(length) for length in lengths])
    rewards = grid(list(batch.rewards.split(lengths)))
    model.load_state_dict(first)
    with torch.no_grad():
        old, ref = (eager_logprobs(actor, batch, select) for actor in (model.actor, reference))
        v_old = eager_values(model, batch)
        penalty = peer("verl.trainer.ppo.core_algos").kl_penalty(old, ref, "kl")  # k1, as TRL's kl_estimator = "k1"
        advantages, returns = estimate(rewards - KL * penalty, v_old, mask)
    model.load_state_dict(second)
    theirs = loss(
        eager_logprobs(model.actor, batch, select), old, advantages, eager_values(model, batch), v_old, returns, mask
    )
    theirs.backward()

    inside = mask.bool()
    assert min(float(sums[name]) for name in ("clip_low", "clip_high", "value_clip")) > 0  # every branch is taken
    close = {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(train.old_logprobs, old[inside], **close)
    torch.testing.assert_close(train.ref_logprobs, ref[inside], **close)
    torch.testing.assert_close(train.advantages, advantages[inside], **close)
    torch.testing.assert_close(train.returns, returns[inside], **close)
    torch.testing.assert_close(sums["loss"].double() / inside.sum(), theirs.detach().double(), **close)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert mine.keys() == gradients.keys()
    assert max(float(g.abs().max()) for g in mine.values()) > 1e-2
    for name, gradient in gradients.items():
        torch.testing.assert_close(mine[name], gradient, **close, msg=lambda m, name=name: f"{name}: {m}")
