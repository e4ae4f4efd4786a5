"""Each lever of memory does what it says: the same losses and gradients to rounding, and fewer bytes, counted."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from support import actor_critic, random_rollouts, wide_llama
from test_ppo import build
from test_trainer import values
from torch import nn

from tppo_fast import building, checkpoint, losses, model, offload, optimizers, packing, runs, seeding, trainer
from tppo_fast import config as settings
from tppo_fast.errors import TrainingDiverged, UserError
from tppo_fast.ppo import PPO

HALF: dict[str, Any] = {"optimizer": "adamw8bit", "weights": "bfloat16"}


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """torchao compiles its step, which takes a minute of a CPU; what it computes is the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


def wide(**options: Any) -> tuple[PPO, Any]:
    """A PPO whose weights are large enough to be quantised, and a batch."""
    dtype = "bfloat16" if options.get("weights") == "bfloat16" else "float32"
    ac = actor_critic(wide_llama, shared_body=True, dtype=dtype)
    if options.get("weights") == "bfloat16":
        optimizers.store_in_half([ac.actor])
    return build(model=ac, dtype=dtype, n=2, share=True, **{"kl_placement": "off", "epochs": 1, **options})


def state_bytes(ppo: PPO) -> int:
    tensors, _ = checkpoint.flatten(ppo.optimizer.state_dict())
    return sum(t.numel() * t.element_size() for t in tensors.values())


# -------------------------------------------------------------------- 8-bit optimizer


def test_eight_bits_move_the_weights_as_adamw_does_with_a_quarter_of_the_states() -> None:
    pytest.importorskip("torchao")
    moved, sizes = [], []
    for name in ("adamw", "adamw8bit"):
        ppo, batch = wide(optimizer=name, lr=1e-3, weight_decay=0.1)
        before = nn.utils.parameters_to_vector(ppo.model.parameters()).detach().clone()
        for _ in range(3):
            assert ppo.update(ppo.prepare(batch)[0])["ppo/lr"] == pytest.approx(1e-3)
        moved.append(nn.utils.parameters_to_vector(ppo.model.parameters()).detach() - before)
        sizes.append(state_bytes(ppo))
    assert torch.cosine_similarity(*moved, dim=0) > 0.97
    assert sizes[1] < 0.3 * sizes[0]


@pytest.mark.parametrize("seldom", [False, True], ids=["every-step", "rows-now-and-then"])
def test_eight_bits_move_no_weight_further_than_adamw(seldom: bool) -> None:
    """Gradients of one block that span many orders of magnitude; rows that get one now and then, as an embedding's do."""
    pytest.importorskip("torchao")
    generator = torch.Generator().manual_seed(0)
    size = 1e-4 * torch.randn(128, 96, generator=generator).mul(2.5).exp()  # a block of 256 spans rows
    steps, lr, moved = 40, 1e-3, []
    gradients = [size * (1 + torch.randn(size.shape, generator=generator)) for _ in range(steps)]
    if seldom:
        gradients = [g * (torch.rand(len(g), 1, generator=generator) < 0.2) for g in gradients]
    for name in ("adamw", "adamw8bit"):
        weight = nn.Parameter(torch.zeros_like(size))
        optimizer = optimizers.build([([weight], lr)], settings.PPOConfig(optimizer=name))  # type: ignore[arg-type]
        largest = torch.zeros(())
        for gradient in gradients:
            before = weight.detach().clone()
            weight.grad = gradient.clone()
            optimizer.step()
            largest = torch.maximum(largest, (weight.detach() - before).abs().max())
        assert largest <= 3.2 * lr  # (1 - beta1) / sqrt(1 - beta2), after gradients of 0; else about 1
        moved.append(weight.detach().flatten())
    assert moved[1].abs().max() <= 1.1 * lr * steps
    assert (moved[1] - moved[0]).norm() < 0.15 * moved[0].norm()


@pytest.mark.parametrize("options", [{"optimizer": "adamw8bit"}, HALF], ids=["fp32-weights", "bf16-weights"])
def test_quantised_states_continue_bit_for_bit(options: dict[str, Any]) -> None:
    """Saved as plain tensors and numbers, loaded into another run: its next step is the same one."""
    pytest.importorskip("torchao")
    first, batch = wide(**options, lr_schedule="linear")
    first.update(first.prepare(batch)[0])
    tensors, groups = checkpoint.flatten(first.optimizer.state_dict())
    assert {t.dtype for t in tensors.values()} >= {torch.uint8, torch.float32}
    written = save(tensors)
    weights, state, rng = copy.deepcopy(first.model.state_dict()), first.state(), seeding.global_state()
    first.update(first.prepare(batch)[0])

    second, _ = wide(**options, lr_schedule="linear")
    second.model.load_state_dict(weights)
    optimizers.load(second.optimizer, checkpoint.unflatten(load(written), groups))
    second.load_state(state)
    seeding.set_global_state(rng)
    metrics = second.update(second.prepare(batch)[0])
    assert second.optimizer.param_groups[0]["lr"] == first.optimizer.param_groups[0]["lr"] < metrics["ppo/lr"]
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_bad_step_of_eight_bits_changes_nothing() -> None:
    pytest.importorskip("torchao")
    ppo, batch = wide(optimizer="adamw8bit", whiten_advantages=False)
    ppo.update(ppo.prepare(batch)[0])
    train, _ = ppo.prepare(batch)
    before = copy.deepcopy(ppo.model.state_dict())
    states = {name: t.clone() for name, t in checkpoint.flatten(ppo.optimizer.state_dict())[0].items()}
    train.advantages[0] = torch.nan
    with pytest.raises(TrainingDiverged):
        ppo.update(train)
    assert all(torch.equal(before[name], value) for name, value in ppo.model.state_dict().items())
    after, _ = checkpoint.flatten(ppo.optimizer.state_dict())
    assert all(torch.equal(states[name], after[name]) for name in states)


def test_without_the_library_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r'ppo\.optimizer = "adamw8bit" needs the torchao package.*pip install'):
        build(optimizer="adamw8bit")


# -------------------------------------------------------------------- weights in half precision


def test_half_precision_weights_take_half_the_memory_and_learn_the_same() -> None:
    pytest.importorskip("torchao")
    full, batch = wide(optimizer="adamw8bit")
    half, _ = wide(**HALF)
    a, b = (sum(p.numel() * p.element_size() for p in ppo.model.actor.parameters()) for ppo in (full, half))
    assert b * 2 == a
    one, two = full.prepare(batch)[0], half.prepare(batch)[0]
    torch.testing.assert_close(one.old_logprobs, two.old_logprobs, atol=0.1, rtol=0.05)
    _, everyone = half._accumulate_gradient(two, list(range(batch.num_sequences)), True)
    full._accumulate_gradient(one, list(range(batch.num_sequences)), True)
    assert everyone == 1
    grads = [torch.cat([p.grad.flatten() for p in ppo.model.actor.parameters()]) for ppo in (full, half)]  # type: ignore[union-attr]
    assert grads[1].dtype == torch.float32  # summed over microbatches in full precision
    assert torch.cosine_similarity(*grads, dim=0) > 0.99
    metrics = half.update(two)
    assert metrics["ppo/ratio"] == 1.0  # prepare and update read the same weights in the same arithmetic


def test_steps_too_small_for_bfloat16_are_not_lost() -> None:
    """A weight of 1 and steps of 1e-4, a fortieth of what bfloat16 can tell apart from 1: 200 of them add up to 0.02."""
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    config = settings.build({"ppo": HALF, "model": {"dtype": "bfloat16"}}).ppo
    optimizer = optimizers.build([([weight], 1e-4)], config)
    for _ in range(200):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert float(weight.detach().float().mean()) == pytest.approx(1 - 0.02, abs=0.002)


def test_adapters_stay_in_full_precision() -> None:
    layer = nn.ModuleDict({"base": nn.Linear(4, 4), "adapter": nn.Linear(4, 4)})
    layer["base"].requires_grad_(False)
    optimizers.store_in_half([layer])
    assert layer["base"].weight.dtype == torch.bfloat16
    assert layer["adapter"].weight.dtype == torch.float32


def test_adapters_learn_beside_half_precision_weights(tiny_model: Path) -> None:
    """Policy and reference share one set of frozen bfloat16 weights; what learns, its gradients and states are fp32."""
    pytest.importorskip("peft")
    section = {"path": str(tiny_model), "dtype": "bfloat16", "lora_rank": 4, "shared_body": True}
    run = settings.build({"model": section, "ppo": {"lr": 1e-2, "weights": "bfloat16", "epochs": 2}})
    ac, _ = model.build(run.model, "cpu")
    optimizers.store_in_half([ac.actor])
    rollouts = random_rollouts([(9, 5), (6, 4)], n=2, vocab=280)
    batch = packing.pack(rollouts, [[1.0] * len(r.token_ids) for r in rollouts], share_prompts=True)
    reference = ac.actor.frozen_copy()
    ppo = PPO(run, ac, reference, losses.ppo, total_steps=4)
    frozen = [p for p in ac.actor.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert {id(p) for p in reference.parameters()} <= {id(p) for p in frozen}
    before = [p.detach().clone() for p in frozen]
    assert ppo.update(ppo.prepare(batch)[0])["ppo/grad_norm"] > 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, frozen, strict=True))
    learned = [p for p in ac.actor.parameters() if p.requires_grad]
    assert {p.dtype for p in learned} == {torch.float32}
    assert any(float(p.detach().abs().max()) > 0 for name, p in ac.actor.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ppo": {"weights": "bfloat16", "optimizer": "adamw8bit"}}, "model.dtype"),
        ({"ppo": {"weights": "bfloat16"}, "model": {"dtype": "bfloat16"}}, "would vanish"),
        ({"ppo": {"offload": True}, "rollout": {"staleness": 1}}, "ppo.offload"),
        (
            {
                "ppo": {"weights": "bfloat16", "optimizer": "adamw8bit"},
                "model": {"dtype": "bfloat16"},
                "rollout": {"staleness": 1},
            },
            "rounds by the generator",
        ),
        ({"ppo": {"minibatches": 17}}, "ppo.minibatches = 17.*at most"),
        ({"model": {"checkpoint_every": 2}}, "model.checkpoint_every"),
        ({"model": {"checkpoint_offload": True}}, "model.checkpoint_offload"),
    ],
)
def test_switches_that_cannot_work_together_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings.build(values)


@pytest.mark.parametrize("change", [{"ppo__offload": True}, {"model__checkpoint_offload": True}])
def test_offloading_needs_a_gpu(tiny_model: Path, tmp_path: Path, change: dict[str, bool]) -> None:
    options = values(tiny_model, tmp_path / "r", model__gradient_checkpointing=True, **change)
    with pytest.raises(UserError, match=r"offload = true moves memory off a GPU, and device is 'cpu'"):
        trainer.setup(settings.build(options))


# -------------------------------------------------------------------- activations


def saved_bytes(run: Any) -> int:
    """Of distinct tensors that autograd kept, parameters included."""
    seen: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        seen.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(t.untyped_storage().nbytes() for t in seen.values())


def test_checkpointing_every_other_layer_keeps_less_and_computes_the_same(tiny_model: Path) -> None:
    rollouts = random_rollouts([(40, 10)] * 2)
    batch = packing.pack(rollouts, [[1.0] * 10] * 2)
    kept, gradients = [], []
    for options in ({}, {"checkpoint_every": 2}, {"checkpoint_every": 1}):
        section = {"path": str(tiny_model), "gradient_checkpointing": bool(options), **options}
        ac, _ = model.build(settings.build({"model": section}).model, "cpu", critic=False)
        found: list[torch.Tensor] = []
        kept.append(saved_bytes(lambda ac=ac, found=found: found.append(ac.actor.hidden(batch))))
        found[0].square().sum().backward()
        gradients.append(nn.utils.parameters_to_vector([p.grad for p in ac.actor.body.parameters()]))  # type: ignore[arg-type]
    assert kept[0] > 1.3 * kept[1] > 1.3 * kept[2]
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


# -------------------------------------------------------------------- what waits during rollouts


def test_parking_between_steps_changes_no_number() -> None:
    """Adapters or not, a reference and a critic of its own: three steps with everything moved out in between."""
    found = []
    for park in (False, True):
        ppo, batch = build(n=2, share=True, epochs=1)
        rows = []
        for _ in range(3):
            if park:
                ppo.park()
                assert ppo._parked.is_out
                ppo.park()  # a second time does nothing
                ppo.unpark()
            rows.append(ppo.update(ppo.prepare(batch)[0])["ppo/policy_loss"])
        found.append((rows, nn.utils.parameters_to_vector(ppo.model.parameters())))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_what_is_parked_leaves_the_device_and_what_rollouts_need_stays() -> None:
    ppo, batch = build(n=2, share=True, epochs=1)
    ppo.update(ppo.prepare(batch)[0])
    policy = [p.data_ptr() for p in ppo.model.actor.parameters()]
    assert ppo.reference is not None
    waiting = [*ppo.reference.parameters(), *ppo.model.critic.parameters()]
    waiting += [v for s in ppo.optimizer.state.values() for v in s.values() if v.dim()]
    held = [t.detach() for t in waiting]  # so that no new tensor takes an old place
    places = {t.data_ptr() for t in held}
    ppo.park()
    now = [*ppo.reference.parameters(), *ppo.model.critic.parameters()]
    now += [v for s in ppo.optimizer.state.values() for v in s.values() if v.dim()]
    assert not places & {t.data_ptr() for t in now}
    assert policy == [p.data_ptr() for p in ppo.model.actor.parameters()]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_parking_frees_gpu_memory() -> None:
    ppo, batch = build(model=actor_critic(wide_llama).cuda(), n=2, share=True, epochs=1)
    ppo.update(ppo.prepare(batch)[0])
    states = [v for s in ppo.optimizer.state.values() for v in s.values() if v.dim()]
    size = sum(v.nbytes for v in [*states, *ppo.model.critic.parameters()])
    before = torch.cuda.memory_allocated()
    del states
    ppo.park()
    assert torch.cuda.memory_allocated() <= before - size
    ppo.unpark()
    assert torch.cuda.memory_allocated() >= before


def test_shared_weights_are_never_parked() -> None:
    ac = actor_critic()
    assert offload.unshared([ac.actor, None], ac.actor) == []
    assert len(offload.unshared([ac.critic, ac.critic], ac.actor)) == len(list(ac.critic.parameters()))


def test_gradients_do_not_live_through_rollouts() -> None:
    ppo, batch = build()
    ppo.update(ppo.prepare(batch)[0])
    assert all(p.grad is None for p in ppo.model.parameters())


# -------------------------------------------------------------------- the allocator


def test_segments_grow_unless_somebody_decided_or_vllm_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is undone at the end, whatever is written
        monkeypatch.delenv(name)
    sleeping = {"rollout": {"engine": "vllm"}, "vllm": {"sleep": "discard"}}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    runs.growing_segments(settings.build({"device": "cpu"}))
    assert names[0] not in os.environ
    runs.growing_segments(settings.build(sleeping))
    assert names[0] not in os.environ
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 1)
    runs.growing_segments(settings.build({}))
    assert names[0] not in os.environ  # too late
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    told: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    runs.growing_segments(settings.build({}))
    assert (os.environ[names[0]], told) == ("expandable_segments:True", [])
    monkeypatch.delenv(names[0])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)  # nobody reads the variable any more
    runs.growing_segments(settings.build({}))
    assert (os.environ[names[0]], told) == ("expandable_segments:True", ["expandable_segments:True"])
    monkeypatch.setenv(names[0], "backend:cudaMallocAsync")
    runs.growing_segments(settings.build({}))
    assert os.environ[names[0]] == "backend:cudaMallocAsync"


@pytest.mark.parametrize(
    ("vllm", "device", "emptied"),
    [
        ({"sleep": "stop", "process": "worker"}, "cuda", 1),
        ({"sleep": "discard", "process": "server", "url": "http://a"}, "cuda", 1),
        ({"sleep": "discard"}, "cuda", 0),  # vLLM does so itself when it wakes up in this process
        ({"process": "worker"}, "cuda", 0),
        ({"sleep": "stop", "process": "worker"}, "cpu", 0),
    ],
)
def test_the_allocators_cache_is_emptied_for_another_process_alone(
    monkeypatch: pytest.MonkeyPatch, vllm: dict[str, Any], device: str, emptied: int
) -> None:
    package = Path(trainer.__file__).parent
    found = {path.name for path in package.rglob("*.py") if "empty_cache" in path.read_text()}
    assert found == {"building.py", "remote.py"}  # the second before it starts a worker
    calls: list[None] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(None))
    ppo: Any = SimpleNamespace(config=settings.build({"vllm": vllm}), device=torch.device(device), park=lambda: None)
    building.make_room(ppo)
    assert len(calls) == emptied
