"""Rollouts in, packed tensors out. The one place that computes positions, segments and the action index space."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from tppo_fast.data_types import Rollout, RolloutBatch, TrainBatch, TrainRows, to_device
from tppo_fast.errors import UserError

_PER_ACTION = tuple(f.name for f in fields(TrainRows))


@dataclass(slots=True)
class SegmentLists:
    """Segments, one after the other: the lists that a packed batch is made of."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])
    prefix: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], first_position: int = 0, parent: int = -1) -> int:
        """Append a segment, which continues segment ``parent`` (-1: none); returns its number."""
        self.tokens.extend(ids)
        self.positions.extend(range(first_position, first_position + len(ids)))
        self.starts.append(len(self.tokens))
        self.prefix.append(parent)
        return len(self.prefix) - 1


def pack(
    rollouts: Sequence[Rollout], rewards: Sequence[Sequence[float] | Tensor], *, share_prompts: bool = False
) -> RolloutBatch:
    """One packed batch, on the CPU, in the order given.

    Args:
        rollouts: B sampled responses.
        rewards: one sequence of per-token rewards for each rollout, as long as its response.
        share_prompts: put the tokens of a prompt that several neighbouring rollouts continue into the batch only once.

    Raises:
        UserError: an empty prompt or response, or rewards of the wrong length.
    """
    _check(rollouts, rewards)
    made = SegmentLists()
    action_index: list[int] = []
    state_index: list[int] = []
    final_index, cu_actions = [], [0]
    shared: tuple[object, int, int] | None = None  # (prompt, its segment, its last token)

    for rollout in rollouts:
        prompt, response = rollout.prompt.token_ids, rollout.token_ids
        if share_prompts:
            if shared is None or shared[0] is not rollout.prompt:
                shared = (rollout.prompt, made.add(prompt), len(made.tokens) - 1)
            made.add(response, first_position=len(prompt), parent=shared[1])
            before_first = shared[2]
        else:
            made.add([*prompt, *response])
            before_first = len(made.tokens) - len(response) - 1
        end = len(made.tokens)
        first = end - len(response)
        action_index.extend(range(first, end))
        state_index.extend([before_first, *range(first, end - 1)])
        final_index.append(end - 1)
        cu_actions.append(len(action_index))

    flat = [torch.as_tensor(r, dtype=torch.float32) for r in rewards]
    return RolloutBatch(
        token_ids=torch.tensor(made.tokens, dtype=torch.int64),
        position_ids=torch.tensor(made.positions, dtype=torch.int64),
        cu_seqlens=torch.tensor(made.starts, dtype=torch.int32),
        prefix=torch.tensor(made.prefix, dtype=torch.int64),
        action_index=torch.tensor(action_index, dtype=torch.int64),
        state_index=torch.tensor(state_index, dtype=torch.int64),
        final_index=torch.tensor(final_index, dtype=torch.int64),
        cu_actions=torch.tensor(cu_actions, dtype=torch.int32),
        behaviour_logprobs=torch.tensor([x for r in rollouts for x in r.logprobs], dtype=torch.float32),
        rewards=torch.cat(flat) if flat else torch.zeros(0),
        truncated=torch.tensor([r.finish_reason == "length" for r in rollouts], dtype=torch.bool),
    )


def _check(rollouts: Sequence[Rollout], rewards: Sequence[Sequence[float] | Tensor]) -> None:
    if len(rewards) != len(rollouts):
        raise UserError(f"rewards has {len(rewards)} entries for {len(rollouts)} rollouts: give one for each rollout")
    for i, (rollout, reward) in enumerate(zip(rollouts, rewards, strict=True)):
        if not rollout.prompt.token_ids or not rollout.token_ids:
            raise UserError(f"rollout {i} has an empty prompt or response: both need at least one token")
        logprobs, rewarded = _length(rollout.logprobs), _length(reward)
        if (logprobs, rewarded) != (len(rollout.token_ids),) * 2:
            raise UserError(
                f"rollout {i} has {len(rollout.token_ids)} tokens, {logprobs} logprobs and {rewarded} rewards: all three must "
                "have the same length"
            )


def _length(values: Any) -> int | str:
    """How many there are in a list, array or tensor of one axis."""
    return len(values) if hasattr(values, "__len__") and getattr(values, "ndim", 1) == 1 else "no list of"


def select(batch: RolloutBatch, sequences: Sequence[int]) -> tuple[RolloutBatch, Tensor]:
    """The batch of some sequences, in the order given, and where their actions stood: ``(sub-batch, [A'] int64)``."""
    cu_seqlens, cu_actions, prefix = batch.cu_seqlens.tolist(), batch.cu_actions.tolist(), batch.prefix.tolist()
    own = _segment_of(batch, batch.final_index).tolist()
    shared = (prefix[own[b]] for b in sequences)
    # Shared prompts first: then they, and all responses, are slices of the batch for attention.
    renumbered: dict[int, int] = {}
    for s in (*(p for p in shared if p >= 0), *(own[b] for b in sequences)):
        renumbered.setdefault(s, len(renumbered))
    ranges = [torch.arange(cu_seqlens[s], cu_seqlens[s + 1]) for s in renumbered]
    kept = torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.int64)  # [N']
    new_place = torch.full((batch.num_tokens,), -1, dtype=torch.int64)
    new_place[kept] = torch.arange(len(kept))
    spans = [torch.arange(cu_actions[b], cu_actions[b + 1]) for b in sequences]
    rows = torch.cat(spans) if spans else torch.zeros(0, dtype=torch.int64)  # [A']
    picked = torch.as_tensor(sequences, dtype=torch.int64)
    sub = RolloutBatch(
        token_ids=batch.token_ids[kept],
        position_ids=batch.position_ids[kept],
        cu_seqlens=_cumulative([len(r) for r in ranges]),
        prefix=torch.tensor([renumbered.get(prefix[s], -1) for s in renumbered], dtype=torch.int64),
        action_index=new_place[batch.action_index[rows]],
        state_index=new_place[batch.state_index[rows]],
        final_index=new_place[batch.final_index[picked]],
        cu_actions=_cumulative([len(s) for s in spans]),
        behaviour_logprobs=batch.behaviour_logprobs[rows],
        rewards=batch.rewards[rows],
        truncated=batch.truncated[picked],
    )
    return sub, rows


def select_train(batch: TrainBatch, sequences: Sequence[int]) -> TrainBatch:
    """The training batch of some sequences, in the order given, all of it on the device of the batch's rows."""
    sub, rows = select(batch.rollouts, sequences)
    device = batch.old_logprobs.device
    rows = to_device(rows, device)
    return replace(batch, rollouts=sub.to(device), **{name: getattr(batch, name)[rows] for name in _PER_ACTION})


def microbatches(
    batch: RolloutBatch,
    sequences: Sequence[int],
    token_budget: int,
    *,
    pair_cost: float = 0.0,
    multiple_of: int = 1,
) -> list[list[int]]:
    """Split sequences into as few groups of at most ``token_budget`` tokens as first-fit finds, of nearly equal cost.

    Responses to one prompt stay together, so that it is read once, unless they alone are over the budget. Costliest first,
    each lot goes to the cheapest group with room; where that needs more groups, it is the first one with room instead.
    The same set of sequences gives the same groups, in whatever order it is given: that the log-probabilities before and
    during the update come from the same arithmetic, bit for bit, rests on it.

    Args:
        batch: the packed batch that the sequences belong to.
        sequences: which of its B sequences to split.
        token_budget: tokens that one forward and backward pass has memory for.
        pair_cost: what attention to one (query, key) pair costs, in tokens; see ``tppo_fast.flops``.
        multiple_of: make so many groups, or twice as many, ..., for processes that share them; as far as there are lots.

    Raises:
        UserError: one sequence alone is over the budget.
    """
    lots = sorted(_lots(batch, sequences, token_budget, pair_cost), key=lambda lot: (-lot.cost, lot.sequences[0]))
    first_fit = _fill(lots, 0, token_budget, even=False)
    wanted = max(len(first_fit), min(len(lots), -(-len(first_fit) // multiple_of) * multiple_of))
    even = _fill(lots, wanted, token_budget, even=True)
    groups = first_fit if len(even) > wanted == len(first_fit) else even
    return [[b for lot in group for b in lot.sequences] for group in groups]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lot:
    """Sequences that go into one microbatch together."""

    sequences: list[int]
    tokens: int
    cost: float


def _lots(batch: RolloutBatch, sequences: Sequence[int], token_budget: int, pair_cost: float) -> Iterator[_Lot]:
    """The responses to each shared prompt together, as far as the budget allows, and each other sequence alone."""
    lengths = batch.cu_seqlens.diff().tolist()
    own, prefix = _segment_of(batch, batch.final_index).tolist(), batch.prefix.tolist()
    families: dict[tuple[int, int], list[int]] = {}
    for b in sorted(sequences):
        parent = prefix[own[b]]
        families.setdefault((parent, -1) if parent >= 0 else (-1, b), []).append(b)
    for (parent, _), members in families.items():
        before = lengths[parent] if parent >= 0 else 0
        sizes = {b: lengths[own[b]] for b in members}
        lots: list[list[int]] = []
        for b in sorted(members, key=lambda b: (-sizes[b], b)):
            if before + sizes[b] > token_budget:
                raise UserError(
                    f"ppo.microbatch_tokens = {token_budget}: one sequence has {before + sizes[b]} tokens; raise it, or lower "
                    "data.max_prompt_tokens or rollout.max_new_tokens"
                )
            with_room = (lot for lot in lots if before + sum(sizes[c] for c in (*lot, b)) <= token_budget)
            lot = next(with_room, None)
            if lot is None:
                lots.append(lot := [])
            lot.append(b)
        for lot in lots:
            tokens = before + sum(sizes[b] for b in lot)
            pairs = before * (before + 1) // 2 + sum(n * (n + 1) // 2 + n * before for n in (sizes[b] for b in lot))
            yield _Lot(sequences=lot, tokens=tokens, cost=tokens + pair_cost * pairs)


def _fill(lots: Sequence[_Lot], groups: int, token_budget: int, *, even: bool) -> list[list[_Lot]]:
    """Each lot into a group with room, the cheapest one (``even``) or the first; into a new one where none has."""
    filled: list[list[_Lot]] = [[] for _ in range(groups)]
    tokens, costs = [0] * groups, [0.0] * groups
    for lot in lots:
        with_room = [g for g, held in enumerate(tokens) if held + lot.tokens <= token_budget]
        if not with_room:
            with_room = [len(filled)]
            filled.append([])
            tokens.append(0)
            costs.append(0.0)
        chosen = min(with_room, key=costs.__getitem__) if even else with_room[0]
        filled[chosen].append(lot)
        tokens[chosen] += lot.tokens
        costs[chosen] += lot.cost
    return filled


def responses(batch: RolloutBatch) -> list[list[int]]:
    """The sampled tokens of each sequence: what ``pack`` was given."""
    return [part.tolist() for part in batch.actions.split(batch.cu_actions.diff().tolist())]


def prompts(batch: RolloutBatch) -> list[list[int]]:
    """The prompt tokens of each sequence: what ``pack`` was given."""
    out = []
    cu_seqlens = batch.cu_seqlens.tolist()
    first_states = batch.state_index[batch.cu_actions[:-1].long()]  # the last prompt token of each sequence
    for last, segment in zip(first_states.tolist(), _segment_of(batch, first_states).tolist(), strict=True):
        out.append(batch.token_ids[cu_seqlens[segment] : last + 1].tolist())
    return out


def _segment_of(batch: RolloutBatch, token_index: Tensor) -> Tensor:
    return torch.searchsorted(batch.cu_seqlens.long(), token_index, right=True) - 1


def _cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
