"""Packing is lossless, and selecting and splitting keep every index right."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import prompt, rollout

from tppo_fast import flops, packing
from tppo_fast.data_types import Rollout
from tppo_fast.errors import UserError

tokens = st.lists(st.integers(0, 99), min_size=1, max_size=6)
groups = st.lists(st.tuples(tokens, st.lists(tokens, min_size=1, max_size=3)), min_size=1, max_size=5)


def make(group: list[tuple[list[int], list[list[int]]]]) -> list[Rollout]:
    return [rollout(p, r, [-i - 0.5 for i in range(len(r))]) for ids, rs in group for p in [prompt(ids)] for r in rs]


def rewards_of(rollouts: list[Rollout]) -> list[list[float]]:
    return [[float(100 * b + t) for t in range(len(r.token_ids))] for b, r in enumerate(rollouts)]


def test_worked_example_of_data_types() -> None:
    batch = packing.pack([rollout(prompt([10, 11]), [20, 21]), rollout(prompt([12]), [22])], [[1.0, 2.0], [3.0]])
    assert batch.token_ids.tolist() == [10, 11, 20, 21, 12, 22]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 4, 6]
    assert batch.action_index.tolist() == [2, 3, 5]
    assert batch.state_index.tolist() == [1, 2, 4]
    assert batch.final_index.tolist() == [3, 5]
    assert batch.cu_actions.tolist() == [0, 2, 3]


def test_worked_example_shared() -> None:
    p = prompt([10, 11])
    batch = packing.pack([rollout(p, [20, 21]), rollout(p, [30])], [[1.0, 2.0], [3.0]], share_prompts=True)
    assert batch.token_ids.tolist() == [10, 11, 20, 21, 30]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 2]
    assert batch.prefix.tolist() == [-1, 0, 0]
    assert batch.state_index.tolist() == [1, 2, 1]


@settings(deadline=None)
@given(groups, st.booleans())
def test_lossless(group: list[tuple[list[int], list[list[int]]]], share: bool) -> None:
    rollouts = make(group)
    batch = packing.pack(rollouts, rewards_of(rollouts), share_prompts=share)
    assert packing.responses(batch) == [r.token_ids for r in rollouts]
    assert packing.prompts(batch) == [r.prompt.token_ids for r in rollouts]
    assert batch.rewards.tolist() == [x for row in rewards_of(rollouts) for x in row]
    assert batch.behaviour_logprobs.tolist() == [x for r in rollouts for x in r.logprobs]
    for b, r in enumerate(rollouts):  # an action's position follows its state's: nothing else precedes it
        rows = slice(*batch.cu_actions[b : b + 2].tolist())
        before, at = batch.position_ids[batch.state_index[rows]], batch.position_ids[batch.action_index[rows]]
        assert torch.equal(before + 1, at)
        assert at.tolist() == list(range(len(r.prompt.token_ids), len(r.prompt.token_ids) + len(r.token_ids)))


@settings(deadline=None)
@given(groups, st.booleans(), st.randoms(use_true_random=False))
def test_select_equals_packing_the_chosen(group: list, share: bool, random: object) -> None:
    rollouts = make(group)
    rewards = rewards_of(rollouts)
    batch = packing.pack(rollouts, rewards, share_prompts=share)
    chosen = [b for b in range(len(rollouts)) if random.random() < 0.6]  # type: ignore[attr-defined]
    sub, rows = packing.select(batch, chosen)
    direct = packing.pack([rollouts[b] for b in chosen], [rewards[b] for b in chosen], share_prompts=share)
    for name in ("cu_actions", "behaviour_logprobs", "rewards", "truncated"):
        assert torch.equal(getattr(sub, name), getattr(direct, name)), name
    for name in ("action_index", "state_index", "final_index"):  # the same tokens at the same positions ...
        for held in ("token_ids", "position_ids"):
            mine, theirs = (getattr(x, held)[getattr(x, name)] for x in (sub, direct))
            assert torch.equal(mine, theirs), (name, held)
    assert sub.num_tokens == direct.num_tokens
    assert packing.prompts(sub) == packing.prompts(direct)  # ... behind the same ones
    parents = sub.prefix[sub.prefix >= 0].unique()
    assert parents.tolist() == list(range(len(parents)))  # shared prompts come first
    assert torch.equal(batch.rewards[rows], sub.rewards)


@settings(deadline=None)
@given(groups, st.booleans(), st.integers(12, 40))
def test_microbatches_cover_once_within_budget(group: list, share: bool, budget: int) -> None:
    rollouts = make(group)
    batch = packing.pack(rollouts, rewards_of(rollouts), share_prompts=share)
    parts = packing.microbatches(batch, range(len(rollouts)), budget)
    assert sorted(b for part in parts for b in part) == list(range(len(rollouts)))
    assert all(packing.select(batch, part)[0].num_tokens <= budget for part in parts)


def test_microbatches_read_a_prompt_once_and_cost_alike() -> None:
    """Eight prompts of 60 to 95 tokens, four responses each: a prompt is never read twice, and no pass is an outlier."""
    group = [([1] * (60 + 5 * i), [[2] * (4 + j) for j in range(4)]) for i in range(8)]
    rollouts = make(group)
    batch = packing.pack(rollouts, rewards_of(rollouts), share_prompts=True)
    everyone = list(range(len(rollouts)))
    parts = packing.microbatches(batch, everyone, 260, pair_cost=0.01)
    read = [packing.select(batch, part)[0] for part in parts]
    assert sum(part.num_tokens for part in read) == batch.num_tokens
    assert len(parts) == -(-batch.num_tokens // 260)
    costs = [part.num_tokens + 0.01 * flops.visible_pairs(part) for part in read]
    assert max(costs) < 1.15 * min(costs)
    assert packing.microbatches(batch, everyone[::-1], 260, pair_cost=0.01) == parts


def test_a_prompt_is_repeated_only_when_its_responses_need_more_than_a_pass() -> None:
    rollouts = make([([1] * 10, [[2] * 8 for _ in range(5)])])
    batch = packing.pack(rollouts, rewards_of(rollouts), share_prompts=True)
    assert packing.microbatches(batch, range(5), 50) == [[0, 1, 2, 3, 4]]
    assert packing.microbatches(batch, range(5), 30) == [[0, 1], [2, 3], [4]]


def test_balance_never_costs_a_pass() -> None:
    """First-fit packs 5 + 5 and 4 + 3 + 3 into two passes of 10; least-loaded-first would need three."""
    rollouts = make([([1], [[2] * (n - 1)]) for n in (5, 5, 4, 3, 3)])
    batch = packing.pack(rollouts, rewards_of(rollouts))
    assert packing.microbatches(batch, range(5), 10) == [[0, 1], [2, 3, 4]]


def test_refuses_bad_input() -> None:
    good = rollout(prompt([1]), [2, 3])
    with pytest.raises(UserError, match=r"2 tokens.*1 rewards"):
        packing.pack([good], [[1.0]])
    with pytest.raises(UserError, match="no list of rewards"):
        packing.pack([good], [torch.tensor(1.0)])
    with pytest.raises(UserError, match="no list of rewards"):
        packing.pack([good], [1.0])  # type: ignore[list-item]
    with pytest.raises(UserError, match="2 entries for 1 rollouts"):
        packing.pack([good], [[1.0, 2.0], [3.0]])
    with pytest.raises(UserError, match="empty prompt or response"):
        packing.pack([rollout(prompt([]), [1])], [[1.0]])
    with pytest.raises(UserError, match=r"microbatch_tokens = 2.*3 tokens"):
        packing.microbatches(packing.pack([good], [[1.0, 2.0]]), [0], 2)
