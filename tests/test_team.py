"""Several processes' sums, played by threads: every one has the same numbers, and they are those of one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from support import actor_critic, random_rollouts

from tppo_fast import config as settings
from tppo_fast import losses, packing
from tppo_fast.data_types import RolloutBatch
from tppo_fast.errors import ProcessFailed, TrainingDiverged, UserError
from tppo_fast.ppo import PPO
from tppo_fast.team import Team

T = TypeVar("T")
LENGTHS = [(9, 5), (3, 2), (6, 7), (2, 1), (12, 4), (5, 6), (4, 4)]


def learner(team: Team, *, model: dict[str, Any] | None = None, **options: Any) -> tuple[PPO, RolloutBatch]:
    sections = {
        "ppo": {"lr": 1e-2, "minibatches": 2, **options.pop("ppo", {})},
        "model": {"path": "memory", **(model or {})},
    }
    config = settings.build({**sections, "rollout": {"samples_per_prompt": 3}, **options})
    made = actor_critic(**(model or {}))
    reference = None if config.ppo.kl_placement == "off" else made.actor.frozen_copy()
    rollouts = random_rollouts(LENGTHS, n=3)
    g = torch.Generator().manual_seed(3)
    rewards = [torch.randn(len(r.token_ids), generator=g) for r in rollouts]
    batch = packing.pack(rollouts, rewards, share_prompts=config.model.share_prompts)
    return PPO(config, made, reference, losses.ppo, total_steps=10, team=team), batch


def together(size: int, folder: Path, play: Callable[[PPO, RolloutBatch], T], **options: Any) -> list[T]:
    """``play`` by every process of a team, with learners that are alike."""
    made = [
        learner(Team(rank, size), **copy.deepcopy(options)) for rank in range(size)
    ]  # torch's generator is of all threads

    def one(given: tuple[PPO, RolloutBatch]) -> T:
        given[0].team.join(torch.device("cpu"), folder / "meeting")
        return play(*given)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, made))


def two_steps(ppo: PPO, batch: RolloutBatch) -> tuple[list[dict[str, float]], list[torch.Tensor], int]:
    """The metrics, the weights, and how many tokens this process read in its last update."""
    rows = []
    for _ in range(2):
        train, prepared = ppo.prepare(batch)
        rows.append({**prepared, **ppo.update(train)})
    return rows, [p.detach().clone() for p in ppo.model.parameters()], ppo._counter._tokens


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "small-microbatches": {"ppo": {"microbatch_tokens": 40, "kl_placement": "loss", "entropy_coef": 0.01}},
    "one-body-warming-up": {"model": {"shared_body": True}, "ppo": {"value_warmup_steps": 1}},
    "target-kl": {"model": {"share_prompts": False}, "ppo": {"target_kl": 1e-4, "epochs": 3}},
    "grpo": {"algorithm": "grpo"},
}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_several_processes_take_the_steps_of_one(size: int, options: dict[str, Any], tmp_path: Path) -> None:
    expected, _, tokens = two_steps(*learner(Team(), **copy.deepcopy(options)))
    found = together(size, tmp_path, two_steps, **options)
    assert sum(read for _, _, read in found) >= tokens
    assert max(read for _, _, read in found) < 0.8 * tokens
    for rows, weights, _ in found:
        assert rows == found[0][0]
        assert all(torch.equal(a, b) for a, b in zip(weights, found[0][1], strict=True))
        for row, wanted in zip(rows, expected, strict=True):
            assert row.keys() == wanted.keys()
            for name in row.keys() - {"ppo/microbatches", "perf/padding_waste"}:
                assert row[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_gradient_is_that_of_one_process(options: dict[str, Any], tmp_path: Path) -> None:
    def gradients(ppo: PPO, batch: RolloutBatch) -> list[torch.Tensor]:
        train, _ = ppo.prepare(batch)
        ppo._accumulate_gradient(train, list(range(batch.num_sequences)), True)
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in ppo.model.parameters()]

    alone = gradients(*learner(Team(), **copy.deepcopy(options)))
    for shared in together(3, tmp_path, gradients, **options):
        for mine, expected in zip(shared, alone, strict=True):
            torch.testing.assert_close(mine, expected, atol=2e-6, rtol=2e-5)


def test_the_prepared_numbers_are_those_of_one_process(tmp_path: Path) -> None:
    ppo, batch = learner(Team())
    alone, _ = ppo.prepare(batch)

    for train in together(3, tmp_path, lambda ppo, batch: ppo.prepare(batch)[0]):
        for name in ("old_logprobs", "ref_logprobs", "values", "advantages", "returns"):
            torch.testing.assert_close(getattr(train, name), getattr(alone, name), atol=2e-6, rtol=2e-5)


def test_a_parameter_that_one_process_did_not_reach_has_the_others_gradient(tmp_path: Path) -> None:
    def play(ppo: PPO, _: RolloutBatch) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.ones(3))
        if ppo.team.rank == 1:
            (weight * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        ppo.team.sum_gradients([weight])
        assert weight.grad is not None
        return weight.grad

    assert [g.tolist() for g in together(2, tmp_path, play)] == [[1.0, 2.0, 3.0]] * 2


def test_gradients_of_weights_in_half_precision_are_summed_in_full(tmp_path: Path) -> None:
    def play(ppo: PPO, _: RolloutBatch) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        weight.grad_dtype = torch.float32
        if ppo.team.rank == 1:
            weight.grad = torch.tensor([1.0 + 2**-20, 0.0])
        ppo.team.sum_gradients([weight])
        assert weight.grad is not None
        return weight.grad

    assert [g.tolist() for g in together(2, tmp_path, play)] == [[1.0 + 2**-20, 0.0]] * 2


def test_metrics_of_other_names_are_refused_before_they_are_summed(tmp_path: Path) -> None:
    def play(ppo: PPO, _: RolloutBatch) -> list[str]:
        ours = {"loss": torch.ones(())}
        assert ppo.team.sum_scalars(ours) == {"loss": torch.tensor(2.0, dtype=torch.float64)}
        said = []
        for more in ({"a": torch.ones(())}, {"b": torch.ones(())} if ppo.team.rank else {"c": torch.ones(())}):
            ppo.team._names = [] if said else ppo.team._names
            with pytest.raises(
                UserError, match=r"ppo\.loss returned the metrics \w, loss, and others before or in another"
            ) as e:
                ppo.team.sum_scalars({**ours, **more})
            said.append(str(e.value))
        return said

    together(2, tmp_path, play)


def test_what_was_summed_when_a_process_failed_is_not_used() -> None:
    ppo, batch = learner(Team())
    train, _ = ppo.prepare(batch)
    ppo.team.abort()
    with pytest.raises(ProcessFailed):
        ppo.update(train)
    assert (ppo.step, ppo.updating) == (0, True)
    with pytest.raises(ProcessFailed):
        ppo.prepare(batch)


def test_weights_that_differ_are_told(tmp_path: Path) -> None:
    def play(ppo: PPO, batch: RolloutBatch) -> str:
        if ppo.team.rank:
            with torch.no_grad():
                next(iter(ppo.model.parameters()))[0, 0] += 1e-3
        train, _ = ppo.prepare(batch)
        with pytest.raises(ProcessFailed, match=r"the processes' weights differ") as caught:
            ppo.update(train)
        return str(caught.value)

    assert len(set(together(2, tmp_path, play))) == 1


def test_a_divergence_is_every_process_s(tmp_path: Path) -> None:
    def play(ppo: PPO, batch: RolloutBatch) -> dict[str, Any]:
        train, _ = ppo.prepare(batch)
        train.advantages[-1] = float("nan")  # one process alone reads it
        with pytest.raises(TrainingDiverged) as caught:
            ppo.update(train)
        assert all(bool(p.isfinite().all()) for p in ppo.model.parameters())
        return {k: v for k, v in caught.value.report.items() if k != "summed_metrics"}

    first, second = together(2, tmp_path, play)
    assert repr(first) == repr(second)
    assert first["parameters_with_bad_gradients"]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("budget", [16, 24, 60, 1000])
def test_there_are_microbatches_for_every_process(size: int, budget: int) -> None:
    rollouts = random_rollouts(LENGTHS, n=2)
    batch = packing.pack(rollouts, [r.logprobs for r in rollouts], share_prompts=True)
    groups = packing.microbatches(batch, range(batch.num_sequences), budget, multiple_of=size)
    assert sorted(b for group in groups for b in group) == list(range(batch.num_sequences))
    assert all(groups)
    assert all(packing.select(batch, group)[0].num_tokens <= budget for group in groups)
    assert len(groups) >= size
    if budget == 1000:
        assert len(groups) == size
