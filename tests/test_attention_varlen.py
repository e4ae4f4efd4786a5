"""Two varlen calls merged by their log-sum-exps against the exact blocks: outputs, gradients, and how often a prompt is read.

torch's flash kernels need a GPU; here their documented contract, written out in plain torch, stands in for them.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from support import actor_critic, random_rollouts
from torch import Tensor, library

from tppo_fast import attention, attention_varlen, model, packing
from tppo_fast.attention_varlen import FlashAttn, Part, TorchFlash
from tppo_fast.data_types import RolloutBatch

SHAPES = [(9, 5), (1, 1), (4, 7), (13, 2)]
ALL = slice(None)


class Plain:
    """``Kernel`` in plain torch, sequence by sequence, by the formulas of a flash kernel; keeps its calls."""

    def __init__(self) -> None:
        self.calls: list[Part] = []

    def forward(self, q: Tensor, k: Tensor, v: Tensor, part: Part, scale: Any, window: Any) -> tuple[Tensor, Tensor]:
        self.calls.append(part)
        out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q))
        for (a, b), (c, d), scores in self._sequences(q, k, part, scale, window):
            lse[:, a:b] = scores.logsumexp(-1)
            out[a:b] = (scores.softmax(-1) @ _heads(v[c:d], q)).transpose(0, 1)
        return out, lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        part: Part,
        scale: Any,
        window: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dv = P^T dO, dS = P (dO V^T - rowsum(dO O)), dq = dS k, dk = dS^T q, with P = exp(S - lse)."""
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        for (a, b), (c, d), scores in self._sequences(q, k, part, scale, window):
            weights = (scores - lse[:, a:b, None]).exp()
            do, o = grad[a:b].transpose(0, 1), out[a:b].transpose(0, 1)
            ds = weights * (do @ _heads(v[c:d], q).mT - (do * o).sum(-1, keepdim=True)) * scale
            dq[a:b] = (ds @ _heads(k[c:d], q)).transpose(0, 1)
            share = q.shape[1] // k.shape[1]
            dk[c:d] = (ds.mT @ q[a:b].transpose(0, 1)).unflatten(0, (-1, share)).sum(1).transpose(0, 1)
            dv[c:d] = (weights.mT @ do).unflatten(0, (-1, share)).sum(1).transpose(0, 1)
        return dq, dk, dv

    def _sequences(self, q: Tensor, k: Tensor, part: Part, scale: Any, window: Any) -> Any:
        assert part.max_queries == int(part.cu_queries.diff().max())
        assert part.max_keys == int(part.cu_keys.diff().max())
        assert part.cu_queries.dtype == part.cu_keys.dtype == torch.int32
        for (a, b), (c, d) in zip(pairwise(part.cu_queries.tolist()), pairwise(part.cu_keys.tolist()), strict=True):
            i, j = torch.arange(b - a, device=q.device)[:, None], torch.arange(d - c, device=q.device)[None]
            seen = (j <= i) if part.causal else torch.ones_like(i + j, dtype=torch.bool)
            if window is not None:
                seen = seen & (j > i - window)
            scores = q[a:b].transpose(0, 1) @ _heads(k[c:d], q).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
            yield (a, b), (c, d), scores.masked_fill(~seen, -torch.inf)


def _heads(x: Tensor, q: Tensor) -> Tensor:
    """[K, Hkv, d] -> [H, K, d]: the key-value head of each query head."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1).transpose(0, 1)


def pack(share: bool, n: int = 3) -> RolloutBatch:
    rollouts = random_rollouts(SHAPES, n=n)
    return packing.pack(rollouts, [r.logprobs for r in rollouts], share_prompts=share)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Plain:
    """The flash path, on a CPU."""
    return use(Plain(), monkeypatch)


def use(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(attention_varlen, "best_kernel", lambda: kernel)
    return kernel


ORDERS = {"in order": range(12), "interleaved": [3 * i + j for j in range(3) for i in range(4)]}


@pytest.mark.parametrize("window", [None, 4, 64], ids=["full", "window-4", "window-64"])
@pytest.mark.parametrize("order", ["packed", *ORDERS])
@pytest.mark.parametrize("prompts", ["separate", "shared"])
def test_the_merge_equals_exact_blocks_forward_and_backward(
    plain: Plain, prompts: str, order: str, window: int | None
) -> None:
    """Also where a prompt lies before its own responses, and where the responses of different prompts alternate."""
    batch = pack(share=prompts == "shared")
    if order in ORDERS:
        batch, _ = packing.select(batch, ORDERS[order])
    g = torch.Generator().manual_seed(0)
    given = [torch.randn(1, h, batch.num_tokens, 8, generator=g, dtype=torch.float64) for h in (4, 2, 2)]
    weight = torch.randn(1, batch.num_tokens, 4, 8, generator=g, dtype=torch.float64)
    found = []
    for flash in (False, True):
        q, k, v = (x.clone().requires_grad_() for x in given)
        out, _ = attention.packed_attention(
            torch.nn.Identity(), q, k, v, None, layout=attention.build_layout(batch, flash=flash), scaling=0.3,
            sliding_window=window,
        )  # fmt: skip
        (out * weight).sum().backward()
        found.append((out, q.grad, k.grad, v.grad))
    for exact, merged in zip(*found, strict=True):
        torch.testing.assert_close(merged, exact, atol=1e-9, rtol=1e-9)
    if prompts == "shared" and window == 4:
        assert not plain.calls  # a window that cuts into the prompt is left to the blocks
    else:
        expected = {"packed": 5, "in order": 2, "interleaved": 4}[order] if prompts == "shared" else 1
        assert len(plain.calls) == expected


def test_opcheck(plain: Plain) -> None:
    """Shapes for tracing, autograd and dynamic shapes, by torch's own checks."""
    batch, _ = packing.select(pack(share=True), range(12))
    calls = attention_varlen.calls(batch.cu_seqlens.tolist(), batch.prefix.tolist(), torch.device("cpu"))
    q, k, v = (torch.randn(batch.num_tokens, h, 8, requires_grad=True) for h in (4, 2, 2))
    library.opcheck(attention_varlen._forward_op, (q, k, v, *calls, 0.3, 64))
    assert plain.calls


def test_a_shared_prompt_is_read_once(plain: Plain) -> None:
    batch, _ = packing.select(pack(share=True), range(12))
    actor_critic().actor.hidden(batch, attention.build_layout(batch, flash=True))
    own, prompts = plain.calls[0], plain.calls[1]
    assert len(plain.calls) == 2 * 2  # layers
    assert own.cu_queries.tolist() == batch.cu_seqlens.tolist()
    assert prompts.cu_keys.diff().tolist() == [p for p, _ in SHAPES]
    assert prompts.cu_queries.diff().tolist() == [3 * r for _, r in SHAPES]


def test_a_model_gives_the_losses_and_gradients_of_the_unshared_exact_pass(
    plain: Plain, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [actor_critic(), actor_critic()]
    outs = [models[0](pack(share=False), temperature=1.0)]
    assert not plain.calls
    monkeypatch.setattr(attention, "can_use_flash", lambda *_: None)
    outs.append(models[1](pack(share=True), temperature=1.0))
    assert plain.calls
    torch.testing.assert_close(outs[0].logprobs, outs[1].logprobs, atol=2e-5, rtol=1e-5)
    for out in outs:
        (out.logprobs.sum() + out.values.square().sum()).backward()
    for (name, a), (_, b) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_capped_scores_are_left_to_the_blocks(plain: Plain) -> None:
    batch = pack(share=True)
    q = torch.randn(1, 4, batch.num_tokens, 8)
    outs = [
        attention.packed_attention(
            torch.nn.Identity(), q, q, q, None, layout=attention.build_layout(batch, flash=flash), softcap=2.0
        )[0]
        for flash in (False, True)
    ]
    assert torch.equal(*outs)
    assert not plain.calls


def test_torchs_kernels_still_take_what_they_are_given() -> None:
    """Their schemas are in every build of torch; the names and the order of the arguments are what ``TorchFlash`` relies on."""
    names = [a.name for a in torch.ops.aten._flash_attention_forward.default._schema.arguments]
    assert names[:10] == [
        "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "return_debug_mask",
    ]  # fmt: skip
    assert {"scale", "window_size_left", "window_size_right"} <= set(names)
    names = [a.name for a in torch.ops.aten._flash_attention_backward.default._schema.arguments]
    assert names[:14] == [
        "grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p",
        "is_causal", "rng_state", "unused",
    ]  # fmt: skip
    assert {"scale", "window_size_left", "window_size_right"} <= set(names)


def test_flash_attn_gets_what_its_functions_are_called_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package itself needs a GPU; its two functions' parameters, of 2.7 to 2.8, over plain torch."""
    plain = Plain()

    def read(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, causal: bool) -> Part:
        return Part(ALL, ALL, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)

    def forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    ):  # fmt: skip
        assert (dropout_p, softcap, alibi_slopes, return_softmax) == (0.0, 0.0, None, False)
        assert window_size_right == (0 if causal else -1)
        part = read(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
        return *plain.forward(q, k, v, part, softmax_scale, _window(window_size_left)), None, None

    def backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, softcap, alibi_slopes, deterministic, rng_state) == (0.0, 0.0, None, False, None)
        assert window_size_right == (0 if causal else -1)
        part = read(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
        found = plain.backward(dout, q, k, v, out, softmax_lse, part, softmax_scale, _window(window_size_left))
        for place, gradient in zip((dq, dk, dv), found, strict=True):
            place.copy_(gradient)

    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    interface.__dict__.update(_flash_attn_varlen_forward=forward, _flash_attn_varlen_backward=backward)
    package.__dict__["flash_attn_interface"] = interface
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    batch = pack(share=True)
    calls = attention_varlen.calls(batch.cu_seqlens.tolist(), batch.prefix.tolist(), torch.device("cpu"))
    given = [torch.randn(batch.num_tokens, h, 8) for h in (4, 2, 2)]
    found = []
    for kernel in (FlashAttn(), Plain()):
        q, k, v = (x.clone().requires_grad_() for x in given)
        use(kernel, monkeypatch)
        out = attention_varlen.attend(q, k, v, calls, window=64)
        out.square().sum().backward()
        found.append((out, q.grad, k.grad, v.grad))
    for mine, exact in zip(*found, strict=True):
        assert torch.equal(mine, exact)


def _window(left: int) -> int | None:
    return None if left < 0 else left + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("share", [False, True], ids=["separate", "shared-prompts"])
def test_the_gpus_kernels_equal_plain_torch(share: bool, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = pack(share)
    best = attention_varlen.best_kernel()
    calls = attention_varlen.calls(batch.cu_seqlens.tolist(), batch.prefix.tolist(), torch.device("cuda"))
    found = []
    for kernel, dtype in (
        (Plain(), torch.float32),
        (best, torch.bfloat16),
        (TorchFlash(), torch.bfloat16),
    ):
        g = torch.Generator(device="cuda").manual_seed(0)
        q, k, v = (
            torch.randn(batch.num_tokens, h, 64, device="cuda", generator=g).bfloat16().to(dtype).requires_grad_()
            for h in (4, 2, 2)
        )
        use(kernel, monkeypatch)
        out = attention_varlen.attend(q, k, v, calls, window=window)
        out.float().square().sum().backward()
        found.append((out, q.grad, k.grad, v.grad))
    for expected, *both in zip(*found, strict=True):
        for got in both:  # outputs and gradients are rounded to 8 bits, and the weights between them
            assert (got.float() - expected).norm() < 1e-2 * expected.norm()
            assert (got.float() - expected).abs().max() < 2e-2 * expected.abs().max()


def test_what_is_chosen_is_what_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = pack(share=True)
    m = actor_critic()
    assert model.layout_of(batch, m.actor.config).flash is None
    monkeypatch.setattr(attention, "can_use_flash", lambda *_: None)
    assert model.layout_of(batch, m.actor.config).flash is not None
    assert model.layout_of(batch, m.actor.config.model_copy(update={"attention": "sdpa"})).flash is None
