"""What tells the methods apart: advantages by hand and against verl and TRL, no trace of a critic where none is needed."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import tppo_kernels as tk
from support import actor_critic, hide_vllm_from_trl, prompt, random_rollouts, rollout, tokenizer

from tppo_fast import config as settings
from tppo_fast import losses, packing, trainer
from tppo_fast.algorithms import ALGORITHMS
from tppo_fast.data_types import Rollout, RolloutBatch
from tppo_fast.errors import UserError
from tppo_fast.metrics import read_metrics
from tppo_fast.model import ActorCritic, NoCritic
from tppo_fast.ppo import PPO
from tppo_fast.rewards import Labels, build_reward


def peer(module: str) -> Any:
    pytest.importorskip(module.split(".")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if module.startswith("trl."):
            hide_vllm_from_trl()
        try:
            return importlib.import_module(module)
        except ImportError as error:
            pytest.skip(f"{module}: {error}")


def packed(rewards: list[list[float]], n: int) -> RolloutBatch:
    p = [prompt([1, 2]) for _ in range(len(rewards) // n)]
    rollouts = [rollout(p[i // n], [3] * len(r)) for i, r in enumerate(rewards)]
    return packing.pack(rollouts, rewards)


def estimate(name: str, batch: RolloutBatch, n: int, **ppo: Any) -> tuple[torch.Tensor, torch.Tensor]:
    values, final = torch.zeros(batch.num_actions), torch.zeros(batch.num_sequences)
    config = settings.build({"ppo": ppo}).ppo
    return ALGORITHMS[name].estimate(batch.rewards, values, final, batch, n, config)


def test_every_choice_of_the_config_is_an_algorithm() -> None:
    choices = settings.Config.model_fields["algorithm"].annotation.__args__  # type: ignore[union-attr]
    assert set(choices) == set(ALGORITHMS)
    for name, algorithm in ALGORITHMS.items():
        config = settings.build({"algorithm": name, "rollout": {"samples_per_prompt": 2}})
        assert algorithm.reward_config(config.reward).placement == (algorithm.placement or "token")


def test_grpo_by_hand() -> None:
    # prompt 1: sums 1, 3 -> mean 2, std sqrt(2); prompt 2: sums 4, 4 -> no spread
    batch = packed([[0.0, 1.0], [3.0], [4.0], [1.0, 1.0, 2.0]], n=2)
    advantages, returns = estimate("grpo", batch, 2)
    half = 1.0 / 2.0**0.5
    torch.testing.assert_close(advantages, torch.tensor([-half, -half, half, 0.0, 0.0, 0.0, 0.0]), atol=1e-5, rtol=0)
    assert torch.equal(advantages, returns)


def test_bot_grpo_by_hand() -> None:
    # tokens 0 1 1 2 of one prompt: mean 1, unbiased variance 2 / 3; a prompt whose tokens are all 5
    batch = packed([[0.0, 1.0], [1.0, 2.0], [5.0], [5.0]], n=2)
    advantages, _ = estimate("bot-grpo", batch, 2)
    step = 1.5**0.5
    torch.testing.assert_close(advantages, torch.tensor([-step, 0.0, 0.0, step, 0.0, 0.0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["grpo", "bot-grpo"])
@pytest.mark.parametrize("reward", [0.1, 1.3, 13.7, 100.1, -1e-3])
def test_rewards_that_are_all_equal_teach_nothing(name: str, reward: float) -> None:
    """Exactly 0: neither the rounding of a mean nor a KL penalty is blown up to a standard deviation of 1."""
    for n in (3, 6, 7):
        advantages, _ = estimate(name, packed([[reward]] * n, n), n)
        assert advantages.tolist() == [0.0] * n
    assert settings.build({"algorithm": name}).ppo.kl_placement == "loss"
    assert settings.Config(algorithm=name, ppo=settings.PPOConfig(lr=1e-3)).ppo.kl_placement == "loss"  # type: ignore[arg-type]
    assert settings.build({"algorithm": name, "ppo": {"kl_placement": "off"}}).ppo.kl_placement == "off"


def test_the_control_is_tppo_on_the_sum() -> None:
    """gamma 1, lambda 1, V = 0: every token of the control gets the whole sum, TPPO's get what is still to come."""
    spread, summed = packed([[1.0, 2.0, 4.0]], 1), packed([[0.0, 0.0, 7.0]], 1)
    assert estimate("tppo", spread, 1, lam=1.0)[0].tolist() == [7.0, 6.0, 4.0]
    assert estimate("control", summed, 1, lam=1.0)[0].tolist() == [7.0, 7.0, 7.0]
    assert estimate("tppo", spread, 1, lam=1.0, gamma=0.5)[0].tolist() == [3.0, 4.0, 4.0]
    assert estimate("control", summed, 1, lam=1.0, gamma=0.5)[0].tolist() == [1.75, 3.5, 7.0]


def test_groups_must_be_whole() -> None:
    with pytest.raises(UserError, match="samples_per_prompt = 2"):
        estimate("grpo", packed([[1.0]] * 3, 1), 2)


@pytest.mark.parametrize("seed", range(3))
def test_grpo_equals_verl(seed: int) -> None:
    algos = peer("verl.trainer.ppo.core_algos")
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (12,), generator=g).tolist()
    rewards = [torch.randn(length, generator=g).tolist() for length in lengths]
    batch = packed(rewards, n=4)
    mine, _ = estimate("grpo", batch, 4)
    rows = [torch.tensor(r) for r in rewards]
    grid = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(length) for length in lengths], batch_first=True)
    theirs, _ = algos.compute_grpo_outcome_advantage(grid.clone(), mask, np.repeat(np.arange(3), 4))
    torch.testing.assert_close(mine, theirs[mask.bool()])


def test_grpo_loss_equals_trl() -> None:
    """TRL's loss (type "dapo": divided by all tokens, as ours), KL in the loss; called without its trainer around it."""
    grpo = peer("trl.trainer.grpo_trainer")
    g = torch.Generator().manual_seed(0)
    lengths = [3, 5, 2, 4]
    width, total = max(lengths), sum(lengths)
    mask = torch.tensor([[float(t < length) for t in range(width)] for length in lengths])
    logp, old, ref = (-torch.rand(4, width, generator=g) * 2 for _ in range(3))
    logp.requires_grad_()
    advantages = torch.randn(4, generator=g)
    fake = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros(4, width), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token",
        beta=0.05, args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1), loss_type="dapo",
        epsilon_low=0.2, epsilon_high=0.28, use_vllm=False, vllm_importance_sampling_correction=False,
        model=SimpleNamespace(training=False), accelerator=_Accelerator(), _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1, _metrics=_Bin(),
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.long), "prompt_mask": torch.ones(4, 1),
        "completion_ids": torch.zeros(4, width, dtype=torch.long), "completion_mask": mask, "advantages": advantages,
        "old_per_token_logps": old, "ref_per_token_logps": ref, "num_items_in_batch": torch.tensor(float(total)),
    }  # fmt: skip
    theirs = grpo.GRPOTrainer._compute_loss(fake, None, inputs)
    inside = mask.bool()
    repeated = advantages[:, None].expand(4, width)[inside]
    mine, _ = tk.ppo_loss(
        logp[inside], old[inside], repeated, clip_low=0.2, clip_high=0.28, ref_logp=ref[inside], kl_coef=0.05,
        kl_estimator="k3",
    )  # fmt: skip
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logp, retain_graph=True)[0] for loss in (mine, theirs)))


class _Accelerator:
    num_processes = 1

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def reduce(self, x: torch.Tensor, reduction: str) -> torch.Tensor:
        del reduction
        return x


class _Bin(dict):
    """Takes any metric."""

    def __missing__(self, _: str) -> Any:
        return _Bin()

    def append(self, _: Any) -> None:
        return None


# ---------------------------------------------------------------- rewards


def judged(rollouts: list[Rollout]) -> list[Labels]:
    return [Labels(spans=[(0, 6)], classes=[2], sentence=i % 2) for i, _ in enumerate(rollouts)]


def per_token(rollouts: list[Rollout]) -> list[list[float]]:
    return [[1.0] * len(r.token_ids) for r in rollouts]


def test_the_sentence_score_stands_on_the_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    tok = tokenizer()
    ids = tok("lisbon hotels")["input_ids"]
    given = [
        Rollout(prompt=prompt([1]), token_ids=ids, logprobs=[0.0] * len(ids), text=tok.decode(ids), finish_reason="stop",
                policy_version=0)
        for _ in range(2)
    ]  # fmt: skip
    base = settings.build({"reward": {"source": "test_algorithms:judged", "length_penalty": True}}).reward
    reward = build_reward(
        ALGORITHMS["ppo"].reward_config(base), tok, expected_length=0.0, separator=", "
    )  # sl = 0: no token would be paid
    rewards, classes = reward.explain(given)
    assert [r.tolist() for r in rewards] == [[0.0] * (len(ids) - 1) + [score] for score in (1.0, 2.0)]
    assert classes is not None
    assert 2 in classes[0]
    source = base.model_copy(update={"source": "test_algorithms:per_token", "placement": "sentence"})
    with pytest.raises(UserError, match='algorithm = "control"'):
        build_reward(source, tok, expected_length=0.0, separator=", ")(given)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"algorithm": "control", "reward": {"placement": "token"}}, 'reward.placement = "token"'),
        ({"algorithm": "grpo", "rollout": {"samples_per_prompt": 1}}, "samples_per_prompt = 1"),
        ({"algorithm": "bot-grpo", "ppo": {"value_warmup_steps": 2}}, "value_warmup_steps = 2"),
        ({"algorithm": "gppo"}, "algorithm = 'gppo'"),
        ({"algorithm": "grpo", "ppo": {"kl_placement": "reward"}}, 'ppo.kl_placement = "reward"'),
    ],
)
def test_what_does_not_fit_is_one_sentence(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        settings.build(values)


# ---------------------------------------------------------------- no critic


@pytest.mark.parametrize("name", ["grpo", "bot-grpo"])
def test_without_a_critic_nothing_of_one_is_left(name: str) -> None:
    config = settings.build({"algorithm": name, "rollout": {"samples_per_prompt": 2}, "ppo": {"lr": 1e-3}})
    actor = actor_critic().actor
    model = ActorCritic(actor, NoCritic(actor.config))
    passes = []
    actor.body.register_forward_hook(lambda *_: passes.append(1))
    ppo = PPO(config, model, actor.frozen_copy(), losses.ppo, total_steps=3)
    rollouts = random_rollouts([(5, 4), (3, 6)], n=2)
    g = torch.Generator().manual_seed(0)
    batch = packing.pack(rollouts, [torch.randn(len(r.token_ids), generator=g) for r in rollouts])
    train, prepared = ppo.prepare(batch)
    before = len(passes)
    ppo._accumulate_gradient(train, list(range(4)), True)
    assert len(passes) == before + 1
    learned = ppo.update(train)
    assert len(list(model.parameters())) == len(list(actor.parameters()))
    assert sum(len(g["params"]) for g in ppo.optimizer.param_groups) == len(list(actor.parameters()))
    assert not {"ppo/value_loss", "ppo/critic_grad_norm", "ppo/value_mean", "ppo/explained_variance"} & (
        prepared.keys() | learned.keys()
    )
    torch.testing.assert_close(train.advantages, ALGORITHMS[name].estimate(
        batch.rewards, train.values, torch.zeros(4), batch, 2, config.ppo)[0])  # fmt: skip


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_algorithm_trains_and_resumes(name: str, tiny_model: Path, tmp_path: Path) -> None:
    values = {
        "run_dir": str(tmp_path / "r"), "algorithm": name, "device": "cpu", "threads": 1, "model": {"path": str(tiny_model)},
        "data": {"synthetic_sessions": 40, "max_prompt_tokens": 180},
        "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 6}, "ppo": {"lr": 1e-3, "epochs": 1},
        "train": {"steps": 1, "eval_every": 0, "eval_prompts": 2, "show_examples": 0, "tensorboard": False},
    }  # fmt: skip
    trainer.train(settings.build(values))
    values["train"] |= {"steps": 2}  # type: ignore[operator]
    (tmp_path / "r" / "policy" / "model.safetensors").unlink()
    trainer.train(settings.build(values), resume=True)
    rows = read_metrics(tmp_path / "r")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert ("ppo/value_loss" in rows[1]) == ALGORITHMS[name].needs_critic
