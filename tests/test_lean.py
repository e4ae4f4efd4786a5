"""What the loop does not do: redundant passes, waiting for the device, logits of the whole batch. Counted, not timed."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import actor_critic, random_rollouts, tiny_llama
from test_ppo import build, gradients
from torch.utils._python_dispatch import TorchDispatchMode

from tppo_fast import config as settings
from tppo_fast import losses, packing, trainer
from tppo_fast.algorithms import ALGORITHMS
from tppo_fast.errors import TrainingDiverged
from tppo_fast.metrics import read_metrics
from tppo_fast.ppo import PPO

HOST = {
    "packing.py",
    "attention.py:build_layout",
    "flops.py:visible_pairs",
    "ppo.py:_minibatches",
    "ppo.py:_accumulate_gradient",
    "reference.py:gae",
    "checks.py:check_segments",
}
"""Where the host plans, on tensors that never leave it; and the plain GAE, a loop over sequences, and the check of its sequences,
which no GPU runs."""
FETCHES = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_consecutive", "_unique2", "bincount",
    "repeat_interleave of unknown size",
}  # fmt: skip


class Ops(TorchDispatchMode):
    """Counts every op, and keeps the size of the largest tensor that one made."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.counts[name] += 1
        if name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            self.counts["repeat_interleave of unknown size"] += 1
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def count_fetches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Where tensors are turned into Python values, except where the host plans."""
    seen: Counter[str] = Counter()

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: torch.Tensor, *args: Any, **options: Any) -> Any:
            code = sys._getframe(1).f_code
            file = Path(code.co_filename).name
            if not {file, f"{file}:{code.co_name}"} & HOST:
                seen[f"{file}:{code.co_name}"] += 1
            return original(self, *args, **options)

        return call

    for name in FETCHES:
        monkeypatch.setattr(torch.Tensor, name, watched(getattr(torch.Tensor, name)))
    return seen


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
@pytest.mark.parametrize("marked", [True, False], ids=["row-local", "whole-batch"])
def test_the_host_waits_once_in_each_phase(monkeypatch: pytest.MonkeyPatch, marked: bool, algorithm: str) -> None:
    """On the plain backend: the compiled CPU ops look at rows, which costs nothing there, and their GPU paths do not."""
    monkeypatch.setenv("TPPO_KERNELS_BACKEND", "reference")
    options = {"minibatches": 2, "epochs": 2, "microbatch_tokens": 40, "kl_placement": "loss"}
    ppo, batch = build(n=2, share=True, algorithm=algorithm, **options)
    if not marked:
        ppo.loss = lambda *args: losses.ppo(*args)
    ppo.update(ppo.prepare(batch)[0])  # makes the optimizer's state
    seen = count_fetches(monkeypatch)
    with Ops() as ops:
        train, _ = ppo.prepare(batch)
    assert seen == {"ppo.py:fetch": 1}
    assert not (WAITS - {"_local_scalar_dense"}) & ops.counts.keys()  # that one is the plain GAE's, see HOST
    seen.clear()
    with Ops() as ops:
        metrics = ppo.update(train)
    assert metrics["ppo/microbatches"] > 4
    assert seen == {"ppo.py:fetch": 1}
    assert not WAITS & ops.counts.keys()


def test_the_count_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_fetches(monkeypatch)
    with Ops() as ops:
        float(torch.ones(()))
        torch.ones(3).cpu()
        torch.arange(2).repeat_interleave(torch.tensor([1, 2]))
    assert seen == {"test_lean.py:test_the_count_can_fail": 2}
    assert WAITS & ops.counts.keys() == {"_local_scalar_dense", "repeat_interleave of unknown size"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_update_queues_without_waiting_on_a_gpu() -> None:
    ppo, batch = build(model=actor_critic().cuda(), n=2, share=True, minibatches=2, microbatch_tokens=64)
    ppo.update(ppo.prepare(batch)[0])
    train, _ = ppo.prepare(batch)
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls itself a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        sums, _ = ppo._accumulate_gradient(train, list(range(batch.num_sequences)), True)
        ppo._optimizer_step(sums["loss"], True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("model", "ppo", "prepare", "update"),
    [
        ({"shared_body": True}, {}, {"actor": 1, "reference": 1}, {"actor": 1}),
        ({"shared_body": True}, {"kl_placement": "off"}, {"actor": 1}, {"actor": 1}),
        ({"shared_body": False}, {}, {"actor": 1, "critic": 1, "reference": 1}, {"actor": 1, "critic": 1}),
    ],
)
def test_one_pass_of_each_body(
    model: dict[str, Any], ppo: dict[str, Any], prepare: dict[str, int], update: dict[str, int]
) -> None:
    """Log-probabilities, entropy and values come from one pass of a shared body; the reference runs in prepare alone."""
    made, batch = build(model=actor_critic(**model), epochs=1, **ppo)
    passes: Counter[str] = Counter()
    bodies = {"actor": made.model.actor.body, "critic": made.model.critic.body}
    if made.reference is not None:
        bodies["reference"] = made.reference.body
    for name, body in bodies.items():
        if body is not None:
            body.register_forward_hook(lambda *_, n=name: passes.update([n]))
    train, _ = made.prepare(batch)
    assert passes == prepare
    passes.clear()
    made.update(train)
    assert passes == update


@pytest.mark.parametrize("train_policy", [True, False], ids=["policy", "value-warmup"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared-body", "own-body"])
def test_row_by_row_is_the_whole_batch(shared: bool, train_policy: bool) -> None:
    """The three-unit head gives the loss, metrics and gradients of log-probabilities that went to the loss whole."""
    results = []
    for marked in (True, False):
        ppo, batch = build(
            model=actor_critic(shared_body=shared), kl_placement="loss", kl_coef=0.1, entropy_coef=0.02, n=2, share=True
        )
        if not marked:
            ppo.loss = lambda *args: losses.ppo(*args)
        train, _ = ppo.prepare(batch)
        sums, _ = ppo._accumulate_gradient(train, list(range(batch.num_sequences)), train_policy)
        results.append((sums, [p.grad for p in ppo.model.parameters()]))
    (sums, grads), (expected_sums, expected_grads) = results
    assert sums.keys() == expected_sums.keys()
    for name, value in sums.items():
        torch.testing.assert_close(value.float(), expected_sums[name].float(), atol=1e-5, rtol=1e-5)
    for a, b in zip(grads, expected_grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_the_first_ratio_is_exactly_1() -> None:
    """Bit for bit, for every action of the first optimizer step, however the batch is split."""
    for options in ({}, {"microbatch_tokens": 32}, {"minibatches": 3}, {"kl_placement": "off"}):
        ppo, batch = build(n=2, share=True, epochs=1, **options)
        seen: list[torch.Tensor] = []

        @losses.row_local
        def watched(outputs: Any, rows: Any, *rest: Any, seen: list[torch.Tensor] = seen) -> Any:
            seen.append(outputs.logprobs.detach() - rows.old_logprobs)
            return losses.ppo(outputs, rows, *rest)

        ppo.loss = watched
        train, _ = ppo.prepare(batch)
        first = next(iter(ppo._minibatches(batch.num_sequences, 0)))
        ppo._accumulate_gradient(train, first, True)
        gaps = torch.cat(seen)
        lengths = batch.cu_actions.diff()
        assert len(gaps) == int(lengths[torch.tensor(first)].sum())
        assert torch.equal(gaps, torch.zeros_like(gaps))


def test_the_first_ratio_of_a_run_is_exactly_1(tiny_model: Path, tmp_path: Path) -> None:
    values = {
        "run_dir": str(tmp_path / "r"), "threads": 1, "device": "cpu", "model": {"path": str(tiny_model)},
        "data": {"synthetic_sessions": 40, "max_prompt_tokens": 180},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 8},
        "ppo": {"lr": 1e-3, "epochs": 1},
        "train": {"steps": 2, "eval_every": 0, "eval_prompts": 2, "show_examples": 0, "tensorboard": False},
    }  # fmt: skip
    trainer.train(settings.build(values))
    rows = [row for row in read_metrics(tmp_path / "r") if row["step"] > 0]
    assert [row["ppo/ratio"] for row in rows] == [1.0, 1.0]
    assert [row["ppo/approx_kl"] for row in rows] == [0.0, 0.0]


def test_logits_of_the_batch_never_live() -> None:
    """1,200 actions and a vocabulary of 32,768: no tensor is larger than the chunk's logits, in either phase."""
    vocab, n = 32_768, 1_200
    model = actor_critic(tiny_llama, vocab, shared_body=True)
    config = settings.build({"ppo": {"epochs": 1, "kl_placement": "off"}, "model": {"path": "memory"}})
    rollouts = random_rollouts([(8, 240)] * 5, vocab=vocab)
    batch = packing.pack(rollouts, [[1.0] * 240] * 5)
    assert batch.num_actions == n
    ppo = PPO(config, model, None, losses.ppo, total_steps=1)
    with Ops() as ops:
        ppo.update(ppo.prepare(batch)[0])
    chunk = (1 << 26) // (4 * vocab)
    assert ops.largest == chunk * vocab < n * vocab


def test_a_bad_step_stops_all_later_ones_on_the_device() -> None:
    """The second minibatch is poisoned: the first one counts, and no weight, moment or step count moves after it."""
    ppo, batch = build(minibatches=3, epochs=2, whiten_advantages=False, kl_placement="off")
    train, _ = ppo.prepare(batch)
    parts = list(ppo._minibatches(batch.num_sequences, 0))
    once, _ = build(minibatches=3, epochs=2, whiten_advantages=False, kl_placement="off")
    sums, _ = once._accumulate_gradient(once.prepare(batch)[0], parts[0], True)
    once._optimizer_step(sums["loss"], True)
    train.advantages[int(batch.cu_actions[parts[1][0]])] = torch.nan
    with pytest.raises(TrainingDiverged) as caught:
        ppo.update(train)
    assert caught.value.report["parameters_with_bad_gradients"]
    for a, b in zip(ppo.model.parameters(), once.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(ppo.optimizer.state.values(), once.optimizer.state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in b)


def test_an_unmarked_loss_sees_the_whole_microbatch() -> None:
    seen = []

    def whole(evaluation: Any, batch: Any, *rest: Any) -> Any:
        seen.append((len(evaluation.logprobs), len(evaluation.final_values), batch.rollouts.num_sequences))
        return losses.ppo(evaluation, batch, *rest)

    ppo, batch = build()
    ppo.loss = whole
    gradients(ppo, batch)
    assert seen == [(batch.num_actions, batch.num_sequences, batch.num_sequences)]
