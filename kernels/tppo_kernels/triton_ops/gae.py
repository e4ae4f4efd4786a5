# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false
# A kernel is called with launch options, and its body is Triton's language, not Python's.
"""Packed generalised advantage estimation: a reverse segmented scan in two launches at any segmentation.

With (A, V) the advantage and value of the next unmasked action, every action is an affine map of them,

    A' = a A + b V + c,    V' = d V + e                 (a masked action: the identity; a last action: constants)

and such maps compose into such maps. The first launch composes each tile of actions; the second composes the tiles to
the right of each tile until one cuts the chain, applies that to its own actions, and sums the whitening statistics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import BLOCKS, counter, is_last_program, on_device, require_fp32

CARRIED_TILES = 128
"""Tiles of a long sequence that are composed at once."""
MERGED = tl.constexpr(1024)
"""Programs whose statistics are merged at once."""


@triton.jit
def _times(x, y):
    """x y, and 0 where x is: another sequence's NaN stays there."""
    return tl.where(x == 0.0, 0.0, x * y)


@triton.jit
def _then5(a1, b1, c1, d1, e1, a0, b0, c0, d0, e0):
    """The map 0 (an earlier action) after the map 1 (a later one): a reverse scan hands the later one first."""
    a = _times(a0, a1)
    b = _times(a0, b1) + _times(b0, d1)
    c = _times(a0, c1) + _times(b0, e1) + c0
    return a, b, c, _times(d0, d1), _times(d0, e1) + e0


@triton.jit
def _then2(a1, c1, a0, c0):
    return _times(a0, a1), _times(a0, c1) + c0


@triton.jit
def _first(x, index):
    return tl.sum(tl.where(index == 0, x, 0.0), 0)


@triton.jit
def _sequence_of(t, starts_ptr, low, high):
    """The sequence that action t belongs to, which lies in [low, high): the last one that starts at or before t."""
    while tl.max(high - low, 0) > 1:
        middle = (low + high) // 2
        before = tl.load(starts_ptr + middle) <= t
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _narrowed(t, starts_ptr, low, high, PROBES: tl.constexpr):
    """``_sequence_of`` one action, by a round of probes: to a PROBES-th of [low, high)."""
    step = (high - low + PROBES - 1) // PROBES
    at = low + step * tl.arange(0, PROBES)
    before = tl.load(starts_ptr + at, mask=at < high, other=2147483647) <= t  # true up to a probe, then false
    low += tl.maximum(tl.sum(before.to(tl.int32), 0) - 1, 0) * step  # before the first sequence: that one
    return low, tl.minimum(low + step, high)


@triton.jit
def _sequences_of_ends(first_t, last_t, starts_ptr, sequences, PROBES: tl.constexpr):
    """The sequences of a tile's first and last action: two searches at once, in few rounds of loads."""
    low0, high0 = sequences * 0, sequences
    low1, high1 = sequences * 0, sequences
    while (high0 - low0 > 1) | (high1 - low1 > 1):
        low0, high0 = _narrowed(first_t, starts_ptr, low0, high0, PROBES)
        low1, high1 = _narrowed(last_t, starts_ptr, low1, high1, PROBES)
    return low0, low1


@triton.jit
def _tile(
    rewards_ptr, values_ptr, starts_ptr, lams_ptr, bootstrap_ptr, mask_ptr, gamma, lam, actions, sequences, tile,
    TILE: tl.constexpr,
):  # fmt: skip
    """The scanned maps of one tile, and its actions' indices, values and mask."""
    index = tl.arange(0, TILE)
    t = tile * TILE + index
    inside = t < actions
    at = tl.minimum(t, actions - 1)
    first, final = _sequences_of_ends(
        tile * TILE, tl.minimum(tile * TILE + TILE, actions) - 1, starts_ptr, sequences, 128
    )
    b = _sequence_of(at, starts_ptr, tl.zeros([TILE], tl.int32) + first, tl.zeros([TILE], tl.int32) + final + 1)
    last = t + 1 == tl.load(starts_ptr + b + 1)
    v = tl.load(values_ptr + at)
    decay = tl.zeros([TILE], tl.float32) + gamma * lam
    if lams_ptr is not None:
        decay = gamma * tl.load(lams_ptr + b)
    end_value = tl.zeros([TILE], tl.float32)
    if bootstrap_ptr is not None:
        end_value = tl.load(bootstrap_ptr + b)
    own = tl.load(rewards_ptr + at) - v
    if mask_ptr is None:
        kept = inside
        next_value = tl.where(last, end_value, tl.load(values_ptr + tl.minimum(t + 1, actions - 1)))
        a = tl.where(inside, tl.where(last, 0.0, decay), 1.0)
        c = tl.where(inside, own + gamma * next_value, 0.0)
        a, c = tl.associative_scan((a, c), 0, _then2, reverse=True)
        zero = tl.zeros([TILE], tl.float32)
        return index, t, inside, kept, v, a, zero, c, zero, zero
    else:
        kept = inside & (tl.load(mask_ptr + at) != 0)
        a = tl.where(kept, decay, 1.0)
        b1 = tl.where(kept, gamma, 0.0)
        c = tl.where(kept, own, 0.0)
        d = tl.where(kept, 0.0, 1.0)
        e = tl.where(kept, v, 0.0)
        cut = last & inside  # the next value is end_value, the next advantage 0
        c = tl.where(cut, c + b1 * end_value, c)
        e = tl.where(cut & (kept == 0), end_value, e)
        a, b1, d = tl.where(cut, 0.0, a), tl.where(cut, 0.0, b1), tl.where(cut, 0.0, d)
        a, b1, c, d, e = tl.associative_scan((a, b1, c, d, e), 0, _then5, reverse=True)
        return index, t, inside, kept, v, a, b1, c, d, e


@triton.jit(do_not_specialize=["actions", "sequences", "tiles"])
def gae_tiles(
    rewards_ptr, values_ptr, starts_ptr, lams_ptr, bootstrap_ptr, mask_ptr, gamma, lam, actions, sequences, totals_ptr,
    tiles, TILE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    index, _t, _inside, _kept, _v, a, b, c, d, e = _tile(
        rewards_ptr,
        values_ptr,
        starts_ptr,
        lams_ptr,
        bootstrap_ptr,
        mask_ptr,
        gamma,
        lam,
        actions,
        sequences,
        tile,
        TILE,
    )
    tl.store(totals_ptr + tile, _first(a, index))
    tl.store(totals_ptr + tiles + tile, _first(b, index))
    tl.store(totals_ptr + 2 * tiles + tile, _first(c, index))
    tl.store(totals_ptr + 3 * tiles + tile, _first(d, index))
    tl.store(totals_ptr + 4 * tiles + tile, _first(e, index))


@triton.jit
def _carry(totals_ptr, tile, tiles, CARRY: tl.constexpr):
    """(A, V) that enters a tile from its right."""
    index = tl.arange(0, CARRY)
    a = tl.full([], 1.0, tl.float32)
    b = tl.full([], 0.0, tl.float32)
    c, d, e = b, a, b
    start = tile + 1
    open_ = start < tiles
    while open_:
        k = start + index
        here = k < tiles
        a1 = tl.load(totals_ptr + k, mask=here, other=1.0)
        b1 = tl.load(totals_ptr + tiles + k, mask=here, other=0.0)
        c1 = tl.load(totals_ptr + 2 * tiles + k, mask=here, other=0.0)
        d1 = tl.load(totals_ptr + 3 * tiles + k, mask=here, other=1.0)
        e1 = tl.load(totals_ptr + 4 * tiles + k, mask=here, other=0.0)
        a1, b1, c1, d1, e1 = tl.associative_scan((a1, b1, c1, d1, e1), 0, _then5, reverse=True)
        a, b, c, d, e = _then5(
            _first(a1, index), _first(b1, index), _first(c1, index), _first(d1, index), _first(e1, index), a, b, c, d, e
        )
        start += CARRY
        open_ = (start < tiles) & ((a != 0.0) | (b != 0.0) | (d != 0.0))
    return c, e


@triton.jit
def _store_stats(partial_ptr, program, x, kept):
    """(count, mean, sum of squared deviations) of one program's entries; the mean is corrected once: equal ones deviate by 0."""
    count = tl.sum(kept.to(tl.float32), 0)
    mean = tl.sum(tl.where(kept, x, 0.0), 0) / tl.maximum(count, 1.0)
    mean += tl.sum(tl.where(kept, x - mean, 0.0), 0) / tl.maximum(count, 1.0)
    deviation = tl.where(kept, x - mean, 0.0)
    tl.store(partial_ptr + 3 * program, count)
    tl.store(partial_ptr + 3 * program + 1, mean)
    tl.store(partial_ptr + 3 * program + 2, tl.sum(deviation * deviation, 0))


@triton.jit
def _count_and_mean(partial_ptr, programs, shift, WIDTH: tl.constexpr):
    """Of all programs' entries, summed as what they are above ``shift``."""
    index = tl.arange(0, WIDTH)
    count = tl.zeros([WIDTH], tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    for start in range(0, programs, WIDTH):
        k = start + index
        n = tl.load(partial_ptr + 3 * k, mask=k < programs, other=0.0, cache_modifier=".cg")
        d = tl.load(partial_ptr + 3 * k + 1, mask=k < programs, other=0.0, cache_modifier=".cg") - shift
        count += n
        total += tl.where(n > 0.0, n * d, 0.0)
    count_all = tl.sum(count, 0)
    return count_all, shift + tl.sum(total, 0) / tl.maximum(count_all, 1.0)


@triton.jit
def _merge_stats(partial_ptr, stats_ptr, programs, WIDTH: tl.constexpr):
    """The statistics of all programs, in order: the mean, twice as in one program, then the deviations from it."""
    index = tl.arange(0, WIDTH)
    _, mean = _count_and_mean(partial_ptr, programs, 0.0, WIDTH)
    count_all, mean = _count_and_mean(partial_ptr, programs, mean, WIDTH)
    squares = tl.zeros([WIDTH], tl.float32)
    for start in range(0, programs, WIDTH):
        k = start + index
        n = tl.load(partial_ptr + 3 * k, mask=k < programs, other=0.0, cache_modifier=".cg")
        d = tl.load(partial_ptr + 3 * k + 1, mask=k < programs, other=0.0, cache_modifier=".cg") - mean
        own = tl.load(partial_ptr + 3 * k + 2, mask=k < programs, other=0.0, cache_modifier=".cg")
        squares += own + tl.where(n > 0.0, n * d * d, 0.0)
    tl.store(stats_ptr, count_all)
    tl.store(stats_ptr + 1, mean)
    tl.store(stats_ptr + 2, tl.sum(squares, 0))


@triton.jit(do_not_specialize=["actions", "sequences", "tiles"])
def gae_apply(
    rewards_ptr, values_ptr, starts_ptr, lams_ptr, bootstrap_ptr, mask_ptr, gamma, lam, actions, sequences, totals_ptr,
    tiles, advantages_ptr, returns_ptr, partial_ptr, stats_ptr, counter_ptr, TILE: tl.constexpr, CARRY: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    _index, t, inside, kept, v, a, b, c, _d, _e = _tile(
        rewards_ptr,
        values_ptr,
        starts_ptr,
        lams_ptr,
        bootstrap_ptr,
        mask_ptr,
        gamma,
        lam,
        actions,
        sequences,
        tile,
        TILE,
    )
    # What no sequence covers reached no other action, and has no advantage. Where the two cases stand decides whether
    # registers suffice on sm_90 and sm_100.
    if mask_ptr is not None:
        kept = kept & (t < tl.load(starts_ptr + sequences)) & (t >= tl.load(starts_ptr))
    next_advantage, next_value = _carry(totals_ptr, tile, tiles, CARRY)
    advantage = _times(a, next_advantage) + _times(b, next_value) + c
    if mask_ptr is None:
        kept = (t < tl.minimum(actions, tl.load(starts_ptr + sequences))) & (t >= tl.load(starts_ptr))
    advantage = tl.where(kept, advantage, 0.0)
    tl.store(advantages_ptr + t, advantage, mask=inside)
    tl.store(returns_ptr + t, advantage + v, mask=inside)
    if stats_ptr is not None:
        _store_stats(partial_ptr, tile, advantage, kept)
        if is_last_program(counter_ptr, tiles):
            _merge_stats(partial_ptr, stats_ptr, tiles, MERGED)


@triton.jit(do_not_specialize=["count", "programs"])
def stats_kernel(x_ptr, mask_ptr, count, partial_ptr, stats_ptr, counter_ptr, programs, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    i = program * BLOCK + tl.arange(0, BLOCK)
    kept = i < count
    if mask_ptr is not None:
        kept = kept & (tl.load(mask_ptr + i, mask=kept, other=0) != 0)
    _store_stats(partial_ptr, program, tl.load(x_ptr + i, mask=kept, other=0.0), kept)
    if is_last_program(counter_ptr, programs):
        _merge_stats(partial_ptr, stats_ptr, programs, MERGED)


def gae(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, lams: Tensor | None, bootstrap: Tensor | None,
    mask: Tensor | None, gamma: float, lam: float, advantages: Tensor, returns: Tensor, stats: Tensor,
) -> None:  # fmt: skip
    size, warps = BLOCKS["gae"]
    actions, tiles = len(require_fp32(rewards)), triton.cdiv(len(rewards), size)
    if not actions:
        stats.zero_()
        return
    totals, partial = rewards.new_empty(5, tiles), rewards.new_empty(tiles, 3)
    mask = None if mask is None else mask.view(torch.uint8)
    inputs = (rewards, values, cu_seqlens, lams, bootstrap, mask, gamma, lam)
    sizes = (actions, len(cu_seqlens) - 1)
    wanted = (stats, counter(stats)) if stats.numel() else (None, None)
    with on_device(rewards):
        gae_tiles[(tiles,)](*inputs, *sizes, totals, tiles, TILE=size, num_warps=warps)
        gae_apply[(tiles,)](
            *inputs, *sizes, totals, tiles, advantages, returns, partial, *wanted,
            TILE=size, CARRY=CARRIED_TILES, num_warps=warps,
        )  # fmt: skip


def stats(x: Tensor, mask: Tensor | None) -> Tensor:
    x = require_fp32(x).float().contiguous()
    size, warps = BLOCKS["stats"]
    programs = triton.cdiv(x.numel(), size)
    if not programs:
        return x.new_zeros(3)
    partial, out = x.new_empty(programs, 3), x.new_empty(3)
    with on_device(x):
        stats_kernel[(programs,)](
            x, None if mask is None else mask.contiguous().view(torch.uint8), x.numel(), partial, out, counter(x),
            programs, BLOCK=size, num_warps=warps,
        )  # fmt: skip
    return out
