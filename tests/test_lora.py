"""Adapters: right gradients, one set of frozen weights for policy, reference and critic, merged weights, exact resume."""

from __future__ import annotations

import copy
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from support import random_rollouts, write_model
from test_trainer import config, trajectory

from tppo_fast import checkpoint, lora, model, packing, trainer
from tppo_fast.config import ModelConfig
from tppo_fast.errors import UserError

BATCH = packing.pack(
    rollouts := random_rollouts([(9, 5), (3, 4)], n=2, vocab=280), [r.logprobs for r in rollouts], share_prompts=True
)


def build(folder: Path, **settings: Any) -> model.ActorCritic:
    """A policy with adapters away from their start."""
    torch.manual_seed(0)
    ac, _ = model.build(ModelConfig(path=str(folder), lora_rank=4, lora_alpha=8, **settings), "cpu")
    with torch.no_grad():
        for p in [*ac.actor.parameters(), *(ac.critic.body or torch.nn.Identity()).parameters()]:
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return ac


def logprobs(actor: model.Actor) -> torch.Tensor:
    return actor.logprobs(actor.hidden(BATCH)[BATCH.state_index], BATCH.actions, 1.0)[0]


def test_merged_weights_are_pefts_own_merge(tiny_model: Path) -> None:
    actor = build(tiny_model).actor
    before = {name: t.clone() for name, t in actor.lm.state_dict().items()}
    merged = dict(actor.named_weights())
    assert all(torch.equal(before[name], t) for name, t in actor.lm.state_dict().items())
    theirs = copy.deepcopy(actor.lm)
    layers = [m for m in theirs.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(layers) == 2 * 7  # every linear layer of two blocks
    for layer in layers:
        layer.merge()  # type: ignore[attr-defined]
    expected = {n.replace(".base_layer", ""): t for n, t in theirs.state_dict().items() if ".lora_" not in n}
    assert merged.keys() == expected.keys() == transformers.LlamaForCausalLM(theirs.config).state_dict().keys()
    assert all(torch.equal(merged[name], t) for name, t in expected.items())
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    assert sum(not torch.equal(plain[name], t) for name, t in merged.items()) == len(layers)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_in_half_precision_small_adapters_survive_the_merge(tiny_model: Path, stored: torch.dtype) -> None:
    """A change far below the last digit of a weight arrives on average, and what was rounded up stays so as it grows."""
    actor = build(tiny_model).actor
    for p in actor.lm.parameters():
        p.data = p.data.bfloat16().to(stored) if not p.requires_grad else p.data.normal_() * 1e-3
    start = {name.replace(".base_layer", ""): t.clone() for name, t in actor.lm.state_dict().items()}
    before, half = actor.named_weights, actor.config.model_copy(update={"dtype": "bfloat16"})
    exact = {name: t.float() for name, t in lora.merged_weights(copy.deepcopy(actor.lm).float())}
    actor.config = half
    merged, again = dict(before()), dict(before())
    changed = [name for name in exact if not torch.equal(exact[name], start[name].float())]
    assert len(changed) == 14
    share = torch.cat(
        [((merged[n].float() - start[n].float()) * (exact[n] - start[n].float())).flatten() for n in changed]
    )
    wanted = torch.cat([(exact[n] - start[n].float()).square().flatten() for n in changed])
    nearest = torch.cat([(exact[n].bfloat16() == start[n].bfloat16()).flatten() for n in changed])
    assert nearest.float().mean() > 0.9  # rounding to nearest would lose them
    assert float(share.sum() / wanted.sum()) == pytest.approx(1.0, abs=0.1)
    assert all(merged[n].dtype == torch.bfloat16 and torch.equal(merged[n], again[n]) for n in changed)


def test_a_merged_weight_lives_one_at_a_time(tiny_model: Path) -> None:
    """Untouched weights are the live tensors; a merged one is gone once the next is asked for."""
    actor = build(tiny_model).actor
    live = {t.data_ptr() for t in actor.lm.state_dict().values()}
    last, merged = None, 0
    for _, tensor in actor.named_weights():
        assert last is None or last() is None
        last = None
        if tensor.data_ptr() not in live:
            last, merged = weakref.ref(tensor), merged + 1
        del tensor
    assert merged == 14


def test_the_reference_is_the_start_on_the_same_weights(tiny_model: Path) -> None:
    ac = build(tiny_model)
    reference = ac.actor.frozen_copy()
    start, _ = model.build(ModelConfig(path=str(tiny_model)), "cpu")
    with torch.no_grad():
        assert torch.equal(logprobs(reference), logprobs(start.actor))
        assert not torch.allclose(logprobs(reference), logprobs(ac.actor), atol=1e-3)
    own = {p.data_ptr() for p in ac.actor.parameters()}
    assert {p.data_ptr() for p in reference.parameters()} <= own
    assert not any(p.requires_grad for p in reference.parameters())


def test_gradients_are_those_of_the_merged_weights(tiny_model: Path) -> None:
    """dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW, with dL/dW from a plain model that holds the merged weights."""
    ac = build(tiny_model, shared_body=True)
    plain, _ = model.build(ModelConfig(path=str(tiny_model)), "cpu")
    plain.actor.lm.load_state_dict(dict(ac.actor.named_weights()))
    for actor in (ac.actor, plain.actor):
        logprobs(actor).sum().backward()
    checked = 0
    for name, layer in ac.actor.lm.named_modules():
        if not isinstance(layer, peft.tuners.lora.LoraLayer):
            continue
        full = plain.actor.lm.get_submodule(name).weight.grad
        a, b, s = layer.lora_A["default"].weight, layer.lora_B["default"].weight, 8 / 4
        torch.testing.assert_close(b.grad, s * full @ a.T, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(a.grad, s * b.T @ full, atol=1e-4, rtol=1e-3)
        checked += 1
    assert checked == 14
    assert all(p.grad is None for p in ac.actor.parameters() if not p.requires_grad)


def test_a_critic_of_its_own_has_adapters_of_its_own_on_the_same_weights(tiny_model: Path) -> None:
    ac = build(tiny_model)
    assert ac.critic.body is not None
    actor, critic = dict(ac.actor.body.named_parameters()), dict(ac.critic.body.named_parameters())
    assert actor.keys() == critic.keys()
    for name, p in critic.items():
        assert (p is actor[name]) == (not p.requires_grad) == (".lora_" not in name)
    with torch.no_grad():
        ac.critic.value_head.weight.normal_()
    ac(BATCH, temperature=1.0).values.sum().backward()
    assert all(p.grad is not None for p in critic.values() if p.requires_grad)
    assert all(p.grad is None for p in ac.actor.parameters())


def test_the_optimizer_holds_adapters_and_value_head_alone(tiny_model: Path, tmp_path: Path) -> None:
    run = trainer.setup(config(tiny_model, tmp_path / "r", **LORA, model__shared_body=True))
    held = {id(p) for group in run.ppo.optimizer.param_groups for p in group["params"]}
    names = {n for n, p in run.ppo.model.named_parameters() if id(p) in held}
    assert {n for n in names if ".lora_" not in n} == {"critic.value_head.weight", "critic.value_head.bias"}
    assert len(names) == 2 + 2 * 14


LORA: dict[str, Any] = {"model__lora_rank": 2, "ppo__lr": 1e-2, "train__eval_every": 0, "train__steps": 4}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # of peft's own class
@pytest.mark.parametrize("shared", [True, False], ids=["shared-body", "own-body"])
def test_resume_is_exact_and_the_policy_loads_plainly(tiny_model: Path, tmp_path: Path, shared: bool) -> None:
    for name in ("whole", "resumed"):
        trainer.train(config(tiny_model, tmp_path / name, **LORA, model__shared_body=shared))
    newest = checkpoint.list_checkpoints(tmp_path / "resumed")[-1]
    assert {p.name for p in newest.iterdir()} == {
        "adapter", "critic.safetensors", "optimizer.safetensors", "state.json"
    }  # fmt: skip
    assert (newest / "critic.safetensors").stat().st_size < 60_000  # no frozen weights
    shutil.rmtree(newest)
    shutil.rmtree(tmp_path / "resumed" / "policy")
    trainer.train(config(tiny_model, tmp_path / "resumed", **LORA, model__shared_body=shared), resume=True)
    assert trajectory(tmp_path / "resumed") == trajectory(tmp_path / "whole")
    assert len({row[3] for row in trajectory(tmp_path / "whole")}) >= 3  # the KL to the start moves
    files = [(tmp_path / name / "policy" / "model.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert files[0] == files[1]
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "policy")
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tiny_model),
        checkpoint.list_checkpoints(tmp_path / "whole")[-1] / "adapter",
    ).merge_and_unload()  # type: ignore[operator]
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor), name


def test_adapters_of_another_rank_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    run = trainer.setup(config(tiny_model, tmp_path / "r", **LORA))
    folder = checkpoint.save(tmp_path / "r", run.ppo, run.tokenizer, run.config)
    other = trainer.setup(config(tiny_model, tmp_path / "r", **{**LORA, "model__lora_targets": ["q_proj"]}))
    with pytest.raises(UserError, match="lora_targets"):
        checkpoint.load(folder, other.ppo)


@pytest.mark.parametrize("targets", [("nothing",), ("lm_head",), ("embed_tokens",)])
def test_bad_targets_are_named(tiny_model: Path, targets: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"model\.lora_targets") as caught:
        model.build(ModelConfig(path=str(tiny_model), lora_rank=2, lora_targets=targets), "cpu")
    assert "\n" not in str(caught.value)


def test_without_peft_there_is_one_sentence(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"model\.lora_rank = 2 needs the peft package"):
        model.build(ModelConfig(path=str(tiny_model), lora_rank=2), "cpu")


def test_experts_in_one_tensor_get_no_adapters(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    settings = {"max_position_embeddings": 256, **shape, **experts}
    write_model(
        tmp_path, lambda size: transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=size, **settings))
    )
    actor = model.build(ModelConfig(path=str(tmp_path), lora_rank=2), "cpu", critic=False)[0].actor
    plain = transformers.MixtralForCausalLM.from_pretrained(tmp_path)
    assert {name for name, _ in actor.named_weights()} == set(plain.state_dict())
    assert any("q_proj" in name for name, p in actor.named_parameters() if p.requires_grad)


def test_conv1d_models_merge_too() -> None:
    """GPT-2 stores its matrices transposed."""
    torch.manual_seed(0)
    settings = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    lm = transformers.GPT2LMHeadModel(settings).eval()
    lora.inject(lm, ModelConfig(path="memory", lora_rank=2))
    with torch.no_grad():
        for p in lm.parameters():
            if p.requires_grad:
                p.normal_(std=0.1)
    plain = transformers.GPT2LMHeadModel(settings).eval()
    plain.load_state_dict(dict(lora.merged_weights(lm)))
    ids = torch.arange(8)[None]
    torch.testing.assert_close(lm(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)
