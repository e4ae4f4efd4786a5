"""The planner's update phase against a measured peak of the CPU allocator; its counts against the model itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support import random_rollouts
from torch.autograd.profiler import profile
from transformers import AutoModelForCausalLM, LlamaConfig

from tppo_fast import checkpoint, cli, losses, model, optimizers, packing, planner
from tppo_fast import config as settings
from tppo_fast.algorithms import ALGORITHMS
from tppo_fast.compiling import compile_layers
from tppo_fast.errors import UserError
from tppo_fast.ppo import PPO


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model large enough that tensors, not Python, decide the peak."""
    from support import tokenizer

    out = tmp_path_factory.mktemp("models") / "m"
    tok = tokenizer()
    config = LlamaConfig(
        vocab_size=4096, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=512, eos_token_id=0, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(out)
    tok.save_pretrained(out)
    return out


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """torchao compiles its step, which takes a minute of a CPU."""
    with torch.compiler.set_stance("force_eager"):
        yield


def build(folder: Path, **changes: Any) -> settings.Config:
    values: dict[str, Any] = {
        "device": "cpu", "model": {"path": str(folder), "share_prompts": False}, "data": {"max_prompt_tokens": 100},
        "rollout": {"samples_per_prompt": 2, "max_new_tokens": 28},
        "ppo": {"microbatch_tokens": 1024, "epochs": 1, "lr": 1e-4},
    }  # fmt: skip
    for name, value in changes.items():
        values[name] = values.get(name, {}) | value if isinstance(value, dict) else value
    return settings.build(values)


def peak(run: Any) -> int:
    """Most bytes that the CPU allocator held above what it held before."""
    with profile(profile_memory=True) as trace:  # torch.profiler's makes Python objects of all events
        run()
    held = most = 0
    events = [e for e in trace.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize(
    "changes",
    [{}, {"model": {"shared_body": True}}, {"algorithm": "grpo"}, {"model": {"gradient_checkpointing": True}},
     {"model": {"lora_rank": 8}}, {"model": {"gradient_checkpointing": True, "checkpoint_every": 2}},
     {"model": {"shared_body": True, "dtype": "bfloat16"}, "ppo": {"optimizer": "adamw8bit", "weights": "bfloat16"}}],
    ids=["two bodies", "one body", "no critic", "checkpointing", "adapters", "every other layer", "eight and sixteen bits"],
)  # fmt: skip
def test_the_update_is_within_15_percent_of_a_measured_peak(folder: Path, changes: dict[str, Any]) -> None:
    check(folder, changes)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_layers_are_planned_as_they_are_partitioned(folder: Path) -> None:
    with torch.compiler.set_stance("default"):
        check(folder, {"model": {"shared_body": True, "dtype": "bfloat16", "compile": True}})


def check(folder: Path, changes: dict[str, Any]) -> None:
    """The plan against a measured update."""
    if changes.get("model", {}).get("lora_rank"):
        pytest.importorskip("peft")
    config = build(folder, **changes)
    critic = ALGORITHMS[config.algorithm].needs_critic
    built, _ = model.build(config.model, "cpu", critic=critic)
    if config.ppo.weights == "bfloat16":
        pytest.importorskip("torchao")
        optimizers.store_in_half([built.actor])
    if config.model.compile:
        compile_layers([built.actor], backend="aot_eager_decomp_partition")
    ppo = PPO(config, built, None, losses.ppo, total_steps=10)
    rollouts = random_rollouts([(100, 28)] * 8, n=2)  # two full microbatches
    batch = packing.pack(rollouts, [[0.1] * 28] * len(rollouts))
    train, _ = ppo.prepare(batch)
    ppo.update(train)  # the optimizer has its states now
    ppo.optimizer.zero_grad(set_to_none=True)
    above = peak(lambda: ppo.update(train))
    update = planner.plan(config)[-1].parts
    static = {"policy weights", "critic weights", "optimizer states"}
    kept = sum(update[name] for name in static & update.keys())
    live = sum(p.numel() * p.element_size() for p in {id(p): p for p in built.parameters()}.values())
    live += sum(t.numel() * t.element_size() for t in checkpoint.flatten(ppo.optimizer.state_dict())[0].values())
    assert kept == pytest.approx(live, rel=0.02)
    planned = sum(size for name, size in update.items() if name not in {"reference weights", "engine weights"})
    print(f"planned {planned / 2**20:.1f} MiB, measured {(kept + above) / 2**20:.1f} MiB, {changes}")
    assert planned == pytest.approx(kept + above, rel=0.15)


def test_the_reference_is_planned_as_it_is_kept(folder: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        config = build(folder, model={"dtype": dtype})
        reference = model.build(config.model, "cpu", critic=False)[0].actor.frozen_copy()
        kept = sum(p.numel() * p.element_size() for p in reference.parameters())
        assert planner.plan(config)[1].parts["reference weights"] == kept


def test_what_each_lever_takes_away(folder: Path) -> None:
    """``ppo.offload`` empties the rollout phase alone; offloaded checkpoints leave only what is recomputed at one time."""
    plain, away = (planner.plan(build(folder, ppo={"offload": on})) for on in (False, True))
    moved = {"optimizer states", "reference weights", "critic weights"}
    assert plain[0].parts.keys() - away[0].parts.keys() == moved
    assert [phase.parts for phase in plain[1:]] == [phase.parts for phase in away[1:]]
    vllm = {"rollout": {"engine": "vllm"}, "vllm": {"kv_cache_gib": 2.0}}
    awake, asleep = (
        planner.plan(build(folder, **{**vllm, "vllm": {**vllm["vllm"], "sleep": s}})) for s in ("off", "discard")
    )
    assert awake[0].parts == asleep[0].parts
    assert awake[-1].total - asleep[-1].total == 2 * planner.GIB + awake[-1].parts["engine weights"]
    served = {"vllm": {"process": "server", "url": "http://a"}, "rollout": {"engine": "vllm"}}
    assert not {"engine weights", "key-value cache"} & planner.plan(build(folder, **served))[0].parts.keys()
    assert planner.plan(build(folder, rollout={"engine": "vllm"}))[0].parts["key-value cache"] == planner.GIB
    adapters = planner.plan(build(folder, rollout={"engine": "vllm"}, model={"lora_rank": 2, "shared_body": True}))
    assert adapters[0].parts["merged weights"] == 4 * planner.measure(build(folder), 16).parameters
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"vllm\.kv_cache_gib is not set"):
            planner.plan(build(folder, rollout={"engine": "vllm"}, device="cuda"))
    kept, offloaded = (
        planner.plan(build(folder, model={"gradient_checkpointing": True, "checkpoint_offload": on}))[-1].parts
        for on in (False, True)
    )
    assert kept["activations"] - offloaded["activations"] == pytest.approx(2 * 4 * 192 * 4 * 1024, rel=0.01)


def test_nothing_is_loaded_and_a_wrong_folder_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    phases = planner.plan(build(tmp_path))
    assert [phase.name for phase in phases] == ["rollout", "prepare", "update"]
    with pytest.raises(UserError, match=r"config\.json"):
        planner.plan(build(tmp_path / "nowhere"))


def test_the_command(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(f'[model]\npath = "{folder}"\n')
    done = CliRunner().invoke(
        cli.cli, ["plan", str(tmp_path / "c.toml"), "--ppo.kl_placement", "off"], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert "activations" in done.output
    assert "reference weights" not in done.output
