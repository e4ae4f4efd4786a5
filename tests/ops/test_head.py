"""The chunked head of a fused backend against the specification, which lets autograd do everything."""

from __future__ import annotations

import pytest
import torch
import tppo_kernels as tk
from head_support import inputs, run_loss, token_loss, wide
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from tppo_kernels import head
from tppo_kernels.testing import assert_close, poisoned, poisoned_memory

OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param({"temperature": 0.7, "logit_scale": 0.5}, id="temperature-scale"),
    pytest.param({"softcap": 5.0}, id="softcap"),
]
SIZES = [
    pytest.param(1, 1, id="one-action"),
    pytest.param(21, 8, id="odd-last-chunk"),
    pytest.param(24, 64, id="one-chunk"),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("actions", "chunk_size"), SIZES)
def test_token_loss_and_its_gradients(actions, chunk_size, options, backend):
    x = inputs(actions, torch.float32)
    with poisoned_memory():
        got = run_loss({k: poisoned(t) for k, t in x.items()}, backend, chunk_size=chunk_size, **options)
    eager, truth = (run_loss(y, "reference", chunk_size=chunk_size, **options) for y in (x, wide(x)))
    assert_close(got, eager, truth, "loss, metrics, gradients")


@pytest.mark.parametrize("logits_dtype", [None, torch.float32], ids=["bf16-logits", "fp32-logits"])
def test_token_loss_in_bf16(logits_dtype, backend):
    x = inputs(20, torch.bfloat16)
    options = {"chunk_size": 8, "logits_dtype": logits_dtype}
    got, eager = run_loss(x, backend, **options), run_loss(x, "reference", **options)
    truth = run_loss(wide(x), "reference", chunk_size=8)
    assert got[-4].dtype == got[-3].dtype == torch.bfloat16
    for mine, theirs, exact in zip(
        got, eager, truth, strict=True
    ):  # eager's own error is the measure: ReLU-like clips flip
        size = exact.norm().clamp_min(1e-3)
        assert (mine.double() - exact).norm() / size <= 2 * (theirs.double() - exact).norm() / size + 2.0**-8


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("actions", "chunk_size"), SIZES)
def test_logprobs_and_their_gradients(actions, chunk_size, options, backend):
    x = inputs(actions, torch.float32)
    upstream = torch.linspace(-1, 1, 2 * actions).reshape(2, actions)
    upstream[:, actions // 2 :: 3] = 0.0

    def run(y, name):
        leaves = [y[k].detach().requires_grad_() for k in ("hidden", "weight", "bias")]
        out = tk.linear_logprobs(
            *leaves[:2], y["targets"], bias=leaves[2], chunk_size=chunk_size, backend=name, **options
        )
        return [*out, *torch.autograd.grad(out, leaves, [u.to(out[0].dtype) for u in upstream])]

    with poisoned_memory():
        got = run({k: poisoned(t) for k, t in x.items()}, backend)
    assert_close(got, run(x, "reference"), run(wide(x), "reference"), "logp, entropy, gradients")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_first_ratio_is_exactly_one(dtype, backend):
    """Old log-probabilities without gradient, new ones inside the loss: the same bits, so exp(new - old) is 1."""
    x, seen = inputs(19, dtype, hidden_size=64), []

    def loss_fn(logp, entropy):
        seen.append((logp.detach(), entropy.detach()))
        return (logp - entropy).sum(), {}

    with torch.no_grad():
        old = tk.linear_logprobs(x["hidden"], x["weight"], x["targets"], chunk_size=8, backend=backend)
    differentiable = tk.linear_logprobs(
        x["hidden"].requires_grad_(), x["weight"], x["targets"], chunk_size=8, backend=backend
    )
    loss, _ = tk.linear_token_loss(x["hidden"], x["weight"], x["targets"], loss_fn, chunk_size=8, backend=backend)
    loss.backward()
    for i in range(2):
        assert torch.equal(torch.cat([part[i] for part in seen]), old[i])
        assert torch.equal(differentiable[i], old[i])


@pytest.mark.parametrize(
    "learned", [("hidden",), ("weight",), ("bias",), ("values",), ("hidden", "bias")], ids="+".join
)
def test_frozen_parts_get_no_gradient(learned, backend, exact):
    x = inputs(20, exact)
    runs = [(x, backend), (x, "reference"), (wide(x), "reference")]
    assert_close(*(run_loss(y, name, learned=learned, chunk_size=8) for y, name in runs))


def test_frozen_weight_costs_no_weight_gradient(backend):
    shapes = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.addmm.out, torch.ops.aten.mm.out):
                shapes.append(tuple(out.shape))
            return out

    x = inputs(16, torch.float32)
    with Products():
        run_loss(x, backend, learned=("hidden",), chunk_size=16)
    assert sorted(shapes) == [(16, 6), (16, 130)]  # logits and dX: two units, no dW


class Recorded(TorchDispatchMode):
    """Records GEMMs and does not run them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.name().startswith("aten::addmm"):
            return func(*args, **(kwargs or {}))
        self.calls.append((func.name(), [a.dtype if isinstance(a, torch.Tensor) else a for a in args], kwargs))
        return kwargs["out"]


@pytest.mark.parametrize("has_mixed", [True, False], ids=["as-shipped", "torch-without-it"])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_gemm_of_bf16_operands_on_a_gpu(has_mixed, beta, monkeypatch):
    """fp32 dW of 16-bit operands is ONE cuBLAS call, decided at import: tensors of a GPU that is not there."""
    half, wide = torch.bfloat16, torch.float32
    if not has_mixed:
        monkeypatch.setattr(head, "MIXED_GEMM", None)
    with FakeTensorMode(), Recorded() as recorded:
        a, b = torch.empty(4, 3, dtype=wide, device="cuda"), torch.empty(3, 5, dtype=half, device="cuda")
        out = torch.empty(4, 5, dtype=wide, device="cuda")
        head.product(a, b, out, beta=beta)
    ((name, args, kwargs),) = recorded.calls
    assert kwargs["out"] is out
    assert kwargs.get("beta", 1) == beta
    if has_mixed:
        assert (name, args) == ("aten::addmm.dtype_out", [wide, half, half, wide])
        schema = head.MIXED_GEMM._schema
        assert [a.name for a in schema.arguments] == [
            "self", "mat1", "mat2", "out_dtype", "beta", "alpha", "out"
        ]  # fmt: skip
    else:
        assert (name, args) == ("aten::addmm.out", [wide] * 3)


@pytest.mark.parametrize("logits_dtype", [None, torch.float32], ids=["bf16-logits", "fp32-logits"])
def test_fp32_masters_of_a_bf16_head(logits_dtype, backend):
    """Values of the rounded weight; a gradient in the master's precision."""
    x = inputs(20, torch.bfloat16) | {"weight": inputs(20, torch.float32)["weight"]}
    options = {"chunk_size": 8, "logits_dtype": logits_dtype}
    got, eager = (run_loss(x, name, **options) for name in (backend, "reference"))
    assert got[-3].dtype == eager[-3].dtype == torch.float32
    truth = run_loss(wide(x | {"weight": x["weight"].bfloat16()}), "reference", chunk_size=8)
    for mine, theirs, exact in zip(got, eager, truth, strict=True):
        size, allowed = exact.norm().clamp_min(1e-3), 2.0**-8 if logits_dtype is None else 1e-5
        allowed = 2.0**-8 if mine.dtype == torch.bfloat16 else allowed
        assert (mine.double() - exact).norm() / size <= 2 * (theirs.double() - exact).norm() / size + allowed


def test_tied_and_low_rank_heads(backend, exact):
    """The weight is a function of parameters: an embedding used twice, and W + B A."""
    tokens = torch.randint(130, (12,))

    def gradients(x, name):
        table = x["weight"].clone().requires_grad_()
        a, b = x["hidden"][:2].clone().requires_grad_(), x["weight"][:, :2].clone().requires_grad_()
        for weight in (table, table.detach() + b @ a):
            loss, _ = tk.linear_token_loss(
                table[tokens] + x["hidden"], weight, x["targets"], lambda logp, _: (-logp.sum(), {}), backend=name
            )
            loss.backward()
        return [table.grad, a.grad, b.grad]

    x = inputs(12, exact)
    assert_close(gradients(x, backend), gradients(x, "reference"), gradients(wide(x), "reference"))


def test_rows_without_gradient_are_left_out(backend, exact):
    """Half of the rows are masked, one chunk entirely."""
    x = inputs(24, exact)
    kept = torch.arange(24) % 3 == 0
    kept[8:16] = False

    def loss_fn(logp, entropy, *rows):
        mask = rows[0]
        return torch.where(mask, logp - 0.1 * entropy, 0.0).sum(), {"kept": mask.sum()}

    results = []
    for y, name in [(x, backend), (x, "reference"), (wide(x), "reference")]:
        leaves = [y[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")]
        with poisoned_memory():
            loss, stats = tk.linear_token_loss(
                *leaves[:2], x["targets"], loss_fn, (kept,), bias=leaves[2], chunk_size=8, backend=name
            )
        loss.backward()
        assert stats["kept"] == kept.sum()
        results.append([loss, *(leaf.grad for leaf in leaves)])
    assert_close(*results)
    assert (results[0][1][~kept] == 0).all()


@pytest.mark.parametrize("learned", [("hidden", "weight", "bias", "values"), ("hidden",)], ids=len)
def test_no_action_has_gradient_zero(learned, backend):
    x = inputs(0, torch.float32)
    with poisoned_memory():
        loss, *rest = run_loss(x, backend, learned=learned)
    assert loss == 0
    assert all(torch.equal(t, torch.zeros_like(t)) for t in rest)


def test_a_loss_that_ignores_its_rows(backend):
    x = inputs(5, torch.float32)
    loss, _ = tk.linear_token_loss(
        x["hidden"].requires_grad_(),
        x["weight"],
        x["targets"],
        lambda logp, _: (logp.new_ones(()), {}),
        backend=backend,
    )
    loss.backward()
    assert loss.item() == pytest.approx(0.2)
    assert torch.equal(x["hidden"].grad, torch.zeros_like(x["hidden"]))


def test_normalizers_add_up_and_may_be_tensors(backend, exact):
    x = inputs(20, exact)
    whole = run_loss(x, backend, chunk_size=4)
    parts = [
        run_loss({k: t if k in ("weight", "bias") else t[s] for k, t in x.items()}, backend, chunk_size=4,
                 normalizer=torch.tensor(20.0, dtype=exact))
        for s in (slice(0, 8), slice(8, 20))
    ]  # fmt: skip
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    torch.testing.assert_close(parts[0][-3] + parts[1][-3], whole[-3])  # the weight's gradient


def test_second_backward_is_loud(backend):
    x = inputs(5, torch.float32)
    loss, _ = tk.linear_token_loss(
        x["hidden"].requires_grad_(), x["weight"], x["targets"], lambda logp, _: (logp.sum(), {}), backend=backend
    )
    (3 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_second_derivatives_are_refused(backend):
    x = inputs(5, torch.float32)
    loss, _ = tk.linear_token_loss(
        x["hidden"].requires_grad_(), x["weight"], x["targets"], lambda logp, _: (logp.sum(), {}), backend=backend
    )
    with pytest.raises(RuntimeError, match="linear_token_loss has no second derivative here: use backend='reference'"):
        torch.autograd.grad(loss, x["hidden"], create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_upstream_gradient_is_not_rounded(dtype, backend):
    """A scale that the dtype of hidden cannot hold: 65,536 is infinite in float16, a third has 8 bits in bfloat16."""
    x = inputs(20, dtype)
    for upstream in (65536.0, 1 / 3):
        grads = [run_loss(x, backend, upstream=u, learned=("hidden",))[-1].double() for u in (1.0, upstream)]
        assert (grads[1] - upstream * grads[0]).abs().max() <= torch.finfo(dtype).eps * upstream * grads[0].abs().max()


def test_a_16_bit_weight_under_wide_hidden_states_is_widened(backend):
    x = inputs(20, torch.float32)
    x["weight"], x["bias"] = x["weight"].bfloat16(), x["bias"].bfloat16()
    assert_close(run_loss(x, backend), run_loss(x, "reference"), run_loss(wide(x), "reference"))


class _Products(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


def test_without_gradients_only_logits_are_multiplied(backend):
    x = inputs(20, torch.float32)
    learned = {k: t.requires_grad_() if t.is_floating_point() else t for k, t in x.items()}
    rows = (learned["old"], learned["advantages"], learned["values"], learned["returns"])
    with _Products() as products, torch.no_grad():
        loss, _ = tk.linear_token_loss(
            learned["hidden"], learned["weight"], learned["targets"], token_loss, rows, chunk_size=64, backend=backend
        )
    assert not loss.requires_grad
    assert products.count == 1


def test_autocast_changes_nothing(backend):
    x = inputs(20, torch.float32)
    for name, gradients in ((backend, 4), ("reference", 0)):  # torch casts the GEMMs of a backward inside of it
        plain = run_loss(x, name, chunk_size=8)
        with torch.autocast("cpu", torch.bfloat16):
            cast = run_loss(x, name, chunk_size=8)
        assert all(torch.equal(a, b) for a, b in list(zip(plain, cast, strict=True))[: len(plain) - 4 + gradients])


def test_a_cpu_widens_the_weight_once(backend):
    """A GEMM there has operands of one dtype: not for each chunk, and not again for its gradient."""
    copies = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].numel() == 130 * 6:
                copies.append(kwargs)
            return func(*args, **(kwargs or {}))

    x = inputs(24, torch.bfloat16)
    with Copies():
        run_loss(x, backend, chunk_size=8, learned=("hidden",), logits_dtype=torch.float32)
    assert len(copies) == 1


def test_a_bias_of_its_own_precision_keeps_it(backend):
    x = inputs(20, torch.bfloat16)
    bias = x["bias"].float().requires_grad_()
    found = []
    for name in (backend, "reference"):
        logp, _ = tk.linear_logprobs(x["hidden"], x["weight"], x["targets"], bias=bias, chunk_size=8, backend=name)
        found.append(torch.autograd.grad(logp.sum(), bias)[0])
    rounded = found[0].bfloat16().float()
    assert found[0].dtype == torch.float32
    assert not torch.equal(found[0], rounded)
    torch.testing.assert_close(*found, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("vocab", [1, 16, 50_257])
def test_rows_of_logits_begin_where_vectors_do(vocab):
    buffer = head._aligned(torch.empty(vocab, 1), 3, torch.bfloat16)
    assert buffer.shape == (3, vocab)
    assert buffer.stride() == (-(-vocab // 16) * 16, 1)


def test_one_chunk_of_logits_at_a_time(backend):
    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                self.entries = max(self.entries, out.numel())
            return out

    x = inputs(20, torch.float32, vocab=500)
    with Largest() as largest:
        run_loss(x, backend, chunk_size=8)
    assert largest.entries <= 8 * 512  # rows begin at multiples of 16 entries


def test_same_bits_every_time(backend):
    x = inputs(20, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(*(run_loss(x, backend, chunk_size=8) for _ in range(2)), strict=True))


def test_opcheck(backend):
    x = inputs(5, torch.float32)
    args = [x[k].requires_grad_() for k in ("hidden", "weight", "bias")]
    op = getattr(getattr(torch.ops, tk.__name__), f"{backend}_linear_logprobs").default
    library.opcheck(op, (*args, x["targets"], 0.7, 0.0, 1.0, 2, None, None))
    library.opcheck(
        op, (*args[:2], x["bias"].double().detach().requires_grad_(), x["targets"], 1.0, 5.0, 1.0, 2, None, None)
    )
    library.opcheck(op, (*args[:2], None, x["targets"], 1.0, 5.0, 1.0, None, torch.float32, False))
