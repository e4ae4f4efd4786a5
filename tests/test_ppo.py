"""prepare and update: the right quantities, gradients that do not depend on how the batch is split, and guards."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import tppo_kernels as tk
from support import actor_critic, random_rollouts

from tppo_fast import config as settings
from tppo_fast import losses, packing
from tppo_fast.advantages import estimate, penalised_rewards
from tppo_fast.data_types import LossOutput, RolloutBatch
from tppo_fast.errors import TrainingDiverged, UserError
from tppo_fast.ppo import PPO, KLController

LENGTHS = [(9, 5), (3, 2), (6, 7), (1, 1), (12, 4), (5, 6)]


def build(
    lengths: Sequence[tuple[int, int]] = LENGTHS, *, n: int = 1, share: bool = False, model: Any = None,
    algorithm: str = "tppo", dtype: str = "float32", **ppo: Any,
) -> tuple[PPO, RolloutBatch]:  # fmt: skip
    """A PPO over a random tiny model, and a batch sampled from nowhere with random rewards."""
    config = settings.build(
        {
            "algorithm": algorithm,
            "ppo": {"lr": 1e-3, **ppo},
            "rollout": {"samples_per_prompt": n},
            "model": {"path": "memory", "dtype": dtype},
        }
    )
    model = model or actor_critic()
    reference = None if config.ppo.kl_placement == "off" else model.actor.frozen_copy()
    rollouts = random_rollouts(lengths, n=n)
    g = torch.Generator().manual_seed(3)
    rewards = [torch.randn(len(r.token_ids), generator=g) for r in rollouts]
    batch = packing.pack(rollouts, rewards, share_prompts=share)
    return PPO(config, model, reference, losses.ppo, total_steps=10), batch


def gradients(ppo: PPO, batch: RolloutBatch) -> list[torch.Tensor]:
    train, _ = ppo.prepare(batch)
    ppo._accumulate_gradient(train, list(range(batch.num_sequences)), True)
    return [p.grad.clone() for p in ppo.model.parameters() if p.grad is not None]


def test_prepare_composes_the_specification() -> None:
    ppo, batch = build(kl_coef=0.3, lam=0.9, gamma=0.97, whiten_advantages=False)
    with torch.no_grad():  # move the policy away from its reference, so that the penalty is not zero
        for p in ppo.model.actor.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        now = ppo.model(batch, temperature=1.0)
        assert ppo.reference is not None
        ref, _ = ppo.reference.logprobs(ppo.reference.hidden(batch)[batch.state_index], batch.actions, 1.0)
    train, metrics = ppo.prepare(batch)
    torch.testing.assert_close(train.old_logprobs, now.logprobs)
    torch.testing.assert_close(train.ref_logprobs, ref)
    rewards = batch.rewards - 0.3 * (now.logprobs - ref)
    advantages, returns = tk.gae(rewards, now.values, batch.cu_actions, gamma=0.97, lam=0.9)
    torch.testing.assert_close(train.advantages, advantages, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(train.returns, returns, atol=1e-5, rtol=1e-4)
    assert metrics["ppo/kl"] == pytest.approx(float((now.logprobs - ref).mean()), abs=1e-6)
    assert abs(metrics["ppo/kl"]) > 1e-3


def test_whitened_advantages() -> None:
    ppo, batch = build()
    train, _ = ppo.prepare(batch)
    assert float(train.advantages.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(train.advantages.std()) == pytest.approx(1.0, abs=1e-5)


def test_old_logprobs_from_the_engine() -> None:
    ppo, batch = build(old_logprobs="engine")
    assert torch.equal(ppo.prepare(batch)[0].old_logprobs, batch.behaviour_logprobs)


@pytest.mark.parametrize("budget", [16, 20, 37])
@pytest.mark.parametrize("share", [False, True], ids=["separate", "shared-prompts"])
def test_gradient_does_not_depend_on_the_microbatches(budget: int, share: bool) -> None:
    options = {"n": 2, "kl_placement": "loss", "kl_coef": 0.1, "entropy_coef": 0.01}
    one = gradients(*build(microbatch_tokens=10_000, **options))
    many = gradients(*build(microbatch_tokens=budget, share=share, **options))
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-5)


def test_first_ratio_is_one_and_the_policy_moves() -> None:
    ppo, batch = build(epochs=1)
    before = copy.deepcopy(ppo.model.state_dict())
    train, _ = ppo.prepare(batch)
    metrics = ppo.update(train)
    assert metrics["ppo/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["ppo/approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert any(not torch.equal(before[k], v) for k, v in ppo.model.state_dict().items())
    assert ppo.step == 1


def test_update_raises_the_probability_of_what_was_rewarded() -> None:
    ppo, batch = build(kl_placement="off", epochs=4)
    train, _ = ppo.prepare(batch)
    ppo.update(train)
    with torch.no_grad():
        moved = ppo.model(batch, temperature=1.0).logprobs - train.old_logprobs
    assert float((moved * train.advantages).mean()) > 0.0


def test_without_a_reference_no_kl_is_logged() -> None:
    for placement, logged in (("off", set()), ("reward", {"ppo/kl", "ppo/kl_loss"})):
        ppo, batch = build(kl_placement=placement)
        train, prepared = ppo.prepare(batch)
        found = prepared.keys() | ppo.update(train).keys()
        assert found & {"ppo/kl", "ppo/kl_loss"} == logged


def test_minibatches_are_prompts_and_cover_every_sequence_each_epoch() -> None:
    ppo, batch = build(n=2, minibatches=4)
    for epoch in range(2):
        parts = list(ppo._minibatches(batch.num_sequences, epoch))
        assert len(parts) == 4
        assert sorted(b for part in parts for b in part) == list(range(12))
        assert all(part[i] + 1 == part[i + 1] and part[i] % 2 == 0 for part in parts for i in range(0, len(part), 2))
    assert list(ppo._minibatches(12, 0)) != list(ppo._minibatches(12, 1))


def test_the_schedule_ends_with_the_run_although_passes_are_skipped() -> None:
    ppo, batch = build(epochs=4, minibatches=2, lr=3e-2, target_kl=1e-6, lr_schedule="linear")
    rates = []
    for _ in range(10):  # total_steps
        metrics = ppo.update(ppo.prepare(batch)[0])
        assert metrics["ppo/epochs_done"] == 0.5  # one of two minibatches: the second sees the first's step
        rates.append(metrics["ppo/lr"])
    assert rates[5] == pytest.approx(3e-2 * (1 - 5 * 8 / 80))
    assert ppo.optimizer.param_groups[0]["lr"] == 0.0


@pytest.mark.parametrize("minibatches", [1, 3])
def test_target_kl_ends_the_steps_before_the_first_that_starts_too_far_away(minibatches: int) -> None:
    """Also where a pass is one step, and the second the last."""
    ppo, batch = build(epochs=2, minibatches=minibatches, lr=1e-2, target_kl=1e-6)
    train, _ = ppo.prepare(batch)
    metrics = ppo.update(train)
    assert metrics["ppo/epochs_done"] == pytest.approx(1 / minibatches)
    assert metrics["ppo/approx_kl"] > 1e-6  # of what was read, the minibatch that was too far away included
    assert metrics["perf/padding_waste"] == 0.0
    once, _ = build(epochs=1, minibatches=minibatches, lr=1e-2, target_kl=1e-6)
    once.update(once.prepare(batch)[0])
    for one, other in zip(ppo.model.parameters(), once.model.parameters(), strict=True):
        assert torch.equal(one, other)
    far, _ = build(epochs=2, minibatches=minibatches, lr=1e-2, target_kl=1e3)
    assert far.update(far.prepare(batch)[0])["ppo/epochs_done"] == 2


def test_value_warmup_moves_the_critic_alone() -> None:
    for shared in (False, True):
        ppo, batch = build(
            model=actor_critic(shared_body=shared), value_warmup_steps=1, kl_placement="loss", entropy_coef=0.1
        )
        before = copy.deepcopy(ppo.model.state_dict())
        for expect_policy_change in (False, True):
            ppo.update(ppo.prepare(batch)[0])
            changed = {k for k, v in ppo.model.state_dict().items() if not torch.equal(before[k], v)}
            assert any(k.startswith("critic.value_head") for k in changed)
            assert any(k.startswith("actor.") for k in changed) == expect_policy_change


def test_learning_rate_schedule_counts_optimizer_steps() -> None:
    ppo, batch = build(epochs=2, minibatches=2, lr=1e-3, lr_schedule="linear", lr_warmup_steps=4)
    assert ppo.optimizer.param_groups[0]["lr"] == 0.0
    ppo.update(ppo.prepare(batch)[0])  # 4 optimizer steps: the warm-up ends, 36 of 40 are left
    assert ppo.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    ppo.update(ppo.prepare(batch)[0])
    assert ppo.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 32 / 36)
    assert ppo.update(ppo.prepare(batch)[0])["ppo/lr"] == pytest.approx(1e-3 * 29 / 36)  # what the last step took


def test_critic_learning_rate_of_its_own() -> None:
    for options, shared, expected in (
        ({"critic_lr": 5e-3}, False, 5e-3),
        ({}, False, 1e-2),
        ({}, True, 1e-2),
        ({"lr": 1e-6}, True, 3e-4),  # a value head alone
        ({"lr": 1e-6}, False, 1e-5),
    ):
        ppo, _ = build(model=actor_critic(shared_body=shared), **{"lr": 1e-3, **options})
        assert [g["lr"] for g in ppo.optimizer.param_groups] == pytest.approx([{"lr": 1e-3, **options}["lr"], expected])


def test_while_the_critic_warms_up_the_policy_s_schedule_and_the_kl_coefficient_wait() -> None:
    options: dict[str, Any] = {
        "lr": 1e-3,
        "critic_lr": 1e-3,
        "epochs": 2,
        "lr_warmup_steps": 4,
        "lr_schedule": "linear",
    }
    ppo, batch = build(value_warmup_steps=3, kl_target=0.05, **options)
    plain, _ = build(**options)
    for _ in range(3):
        ppo.update(ppo.prepare(batch)[0])
        plain.update(plain.prepare(batch)[0])
    rates = [group["lr"] for group in ppo.optimizer.param_groups]
    assert rates[0] == 0.0
    assert rates[1] == plain.optimizer.param_groups[1]["lr"] > 0.0
    assert ppo.kl.coefficient == ppo.config.ppo.kl_coef
    ppo.update(ppo.prepare(batch)[0])
    assert ppo.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 2 / 4)
    assert ppo.kl.coefficient != ppo.config.ppo.kl_coef
    for _ in range(6):  # total_steps
        ppo.update(ppo.prepare(batch)[0])
    assert [group["lr"] for group in ppo.optimizer.param_groups] == [0.0, 0.0]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_divergence_is_named_and_changes_no_weight(poison: float) -> None:
    ppo, batch = build(whiten_advantages=False)
    train, _ = ppo.prepare(batch)
    train.advantages[3] = poison
    before = copy.deepcopy(ppo.model.state_dict())
    with pytest.raises(TrainingDiverged, match="step 1: the loss or a gradient is not finite") as caught:
        ppo.update(train)
    assert all(torch.equal(before[k], v) for k, v in ppo.model.state_dict().items())
    assert caught.value.report["parameters_with_bad_gradients"]
    assert all(p.grad is None for p in ppo.model.parameters())


def test_adaptive_kl_coefficient() -> None:
    kl = KLController(settings.build({"ppo": {"kl_coef": 0.1, "kl_target": 0.05, "kl_horizon": 100.0}}).ppo)
    kl.observe(0.055, 10)
    assert kl.coefficient == pytest.approx(0.1 * (1 + 0.1 * 10 / 100))
    kl.coefficient = 0.1
    kl.observe(5.0, 10)  # the error is clipped at 0.2
    assert kl.coefficient == pytest.approx(0.1 * (1 + 0.2 * 10 / 100))
    fixed = KLController(settings.build({}).ppo)
    fixed.observe(5.0, 10)
    assert fixed.coefficient == settings.build({}).ppo.kl_coef


def test_kl_as_reward_is_the_k1_penalty() -> None:
    rewards = penalised_rewards(torch.tensor([1.0, 2.0]), torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]), 0.2)
    torch.testing.assert_close(rewards, torch.tensor([0.9, 2.2]))


def test_lambda_choices() -> None:
    rewards, values = torch.randn(7), torch.randn(7)
    cu, truncated, final = torch.tensor([0, 5, 7]), torch.tensor([True, False]), torch.tensor([0.7, 0.9])

    def run(**ppo: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return estimate(rewards, values, final, truncated, cu, settings.build({"ppo": ppo}).ppo)

    advantages, returns = run(lam=0.9, lam_critic=1.0)
    assert torch.equal(advantages, tk.gae(rewards, values, cu, lam=0.9)[0])
    assert torch.equal(returns, tk.gae(rewards, values, cu, lam=1.0)[1])
    advantages, _ = run(lam_adaptive=0.5)
    lam = torch.tensor([1 - 1 / 2.5, 1 - 1 / 1.0])
    torch.testing.assert_close(advantages, tk.gae(rewards, values, cu, lam=lam)[0])
    advantages, _ = run(bootstrap_truncated=True)
    torch.testing.assert_close(advantages, tk.gae(rewards, values, cu, lam=0.95, bootstrap=torch.tensor([0.7, 0.0]))[0])


def test_a_loss_of_ones_own() -> None:
    def reinforce(evaluation: Any, batch: Any, config: Any, kl_coef: float, train_policy: bool) -> LossOutput:
        del config, kl_coef, train_policy
        loss = -(evaluation.logprobs * batch.advantages).sum() + evaluation.values.square().sum()
        return LossOutput(loss=loss, metrics={"mine": loss.detach() * 0 + batch.rollouts.num_actions})

    ppo, batch = build(epochs=1)
    ppo.loss = reinforce
    metrics = ppo.update(ppo.prepare(batch)[0])
    assert metrics["custom/mine"] == pytest.approx(1.0)
    assert "ppo/ess" not in metrics
    assert "ppo/approx_kl" not in metrics
    ppo, batch = build(target_kl=0.1)
    ppo.loss = reinforce
    with pytest.raises(UserError, match="approx_kl"):
        ppo.update(ppo.prepare(batch)[0])


def test_bfloat16_runs_close_to_float32() -> None:
    exact, batch = build(kl_placement="off")
    half, _ = build(kl_placement="off", model=actor_critic(dtype="bfloat16"))
    a, b = exact.prepare(batch)[0], half.prepare(batch)[0]
    assert b.old_logprobs.dtype == torch.float32
    torch.testing.assert_close(a.old_logprobs, b.old_logprobs, atol=0.05, rtol=0.02)
    half.update(b)
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
