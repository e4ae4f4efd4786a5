"""The packed pass equals the ordinary one, for many architectures; nothing crosses a sequence; models are checked on load."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from hypothesis import given, settings
from hypothesis import strategies as st
from support import actor_critic, random_rollouts

from tppo_fast import attention, model, packing
from tppo_fast.config import ModelConfig
from tppo_fast.data_types import Rollout, RolloutBatch
from tppo_fast.errors import UserError
from tppo_fast.model import Evaluation

SMALL = {
    "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
ARCHITECTURES = {
    "llama": (t.LlamaConfig, t.LlamaForCausalLM, {}),
    "gpt2": (t.GPT2Config, t.GPT2LMHeadModel, {}),
    "qwen3": (t.Qwen3Config, t.Qwen3ForCausalLM, {}),
    "mistral-sliding": (t.MistralConfig, t.MistralForCausalLM, {"sliding_window": 4}),
    "gemma2-softcap": (t.Gemma2Config, t.Gemma2ForCausalLM, {"sliding_window": 4}),
    "granite-scaled": (t.GraniteConfig, t.GraniteForCausalLM, {"logits_scaling": 3.0}),
    "cohere-scaled": (t.CohereConfig, t.CohereForCausalLM, {"logit_scale": 0.5}),
    "neox": (t.GPTNeoXConfig, t.GPTNeoXForCausalLM, {}),
    "phi-biased-head": (t.PhiConfig, t.PhiForCausalLM, {}),
}

MODEL = actor_critic()


def build(name: str) -> Any:
    config, kind, extra = ARCHITECTURES[name]
    torch.manual_seed(0)
    lm = kind(config(**{**SMALL, **extra})).eval()
    for bias in (parameter for name, parameter in lm.named_parameters() if name.endswith("bias")):
        torch.nn.init.normal_(bias, std=0.3)  # zeros, which hide what is done with them, otherwise
    lm.set_attn_implementation("eager")
    return lm


def pack(rollouts: list[Rollout], share: bool = False) -> RolloutBatch:
    return packing.pack(rollouts, [r.logprobs for r in rollouts], share_prompts=share)


def own_logprobs(lm: Any, rollouts: list[Rollout], temperature: float) -> torch.Tensor:
    """Each sequence alone through the model's own forward pass."""
    out = []
    for r in rollouts:
        ids = torch.tensor([[*r.prompt.token_ids, *r.token_ids]])
        logp = (lm(input_ids=ids).logits[0].float() / temperature).log_softmax(-1)[len(r.prompt.token_ids) - 1 : -1]
        out.append(logp.gather(-1, torch.tensor(r.token_ids)[:, None])[:, 0])
    return torch.cat(out)


@pytest.mark.parametrize("share", [False, True], ids=["separate", "shared-prompts"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_equals_own_forward(name: str, share: bool) -> None:
    lm = build(name)
    rollouts = random_rollouts([(9, 5), (1, 1), (4, 7)], n=2)
    with torch.no_grad():
        expected = own_logprobs(lm, rollouts, 0.7)
        actor = model.Actor(lm, ModelConfig(path="memory"))
        batch = pack(rollouts, share)
        logp, entropy = actor.logprobs(actor.hidden(batch)[batch.state_index], batch.actions, 0.7)
    torch.testing.assert_close(logp, expected, atol=2e-5, rtol=1e-5)
    assert (entropy > 0).all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_reference_in_bfloat16_gives_the_policys_bits_from_less_memory(name: str) -> None:
    lm = build(name)
    policy = model.Actor(lm, ModelConfig(path="memory", dtype="bfloat16"))
    reference = policy.frozen_copy()
    batch = pack(random_rollouts([(9, 5), (4, 7)], n=2), True)
    with torch.no_grad():
        found = [a.logprobs(a.hidden(batch)[batch.state_index], batch.actions, 0.7) for a in (policy, reference)]
    assert torch.equal(found[0][0], found[1][0])
    assert not any(p.requires_grad for p in reference.parameters())
    assert all(p.dtype == torch.float32 for p in policy.parameters())
    small = sum(p.numel() for p in reference.parameters() if p.dtype == torch.bfloat16)
    total = sum(p.numel() for p in reference.parameters())
    assert small > total / 3 or name == "gpt2"  # whose layers are not nn.Linear


def test_gradient_of_shared_prompts_equals_separate() -> None:
    models = [actor_critic(), actor_critic()]
    rollouts = random_rollouts([(9, 5), (3, 2)], n=3)
    for m, share in zip(models, (False, True), strict=True):
        out = m(pack(rollouts, share), temperature=1.0)
        (out.logprobs.sum() + out.values.square().sum()).backward()
    for (name, a), (_, b) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=2, max_size=5), st.integers(0, 4), st.booleans()
)
def test_no_value_crosses_a_sequence(lengths: list[tuple[int, int]], which: int, share: bool) -> None:
    """Turn one sequence's embeddings into NaN: only its outputs may notice. And no gradient may reach it from the others."""
    m = MODEL
    which %= len(lengths)
    batch = pack(random_rollouts(lengths), share)
    segment = torch.searchsorted(batch.cu_seqlens.long(), batch.final_index[which], right=True) - 1
    own = torch.zeros(batch.num_tokens, dtype=torch.bool)
    for s in {int(segment), int(batch.prefix[segment])} - {-1}:
        own[slice(*batch.cu_seqlens[s : s + 2].tolist())] = True
    others = torch.ones(batch.num_actions, dtype=torch.bool)
    others[slice(*batch.cu_actions[which : which + 2].tolist())] = False
    embeddings: list[torch.Tensor] = []

    def embed(poison: float) -> Evaluation:
        def hook(_: object, __: object, out: torch.Tensor) -> torch.Tensor:
            embeddings.append(out.detach().masked_fill(own[None, :, None], poison) if poison else out.detach())
            return embeddings[-1].requires_grad_()

        handles = [b.get_input_embeddings().register_forward_hook(hook) for b in (m.actor.lm, m.critic.body)]
        try:
            return m(batch, temperature=1.0)
        finally:
            [h.remove() for h in handles]

    out = embed(torch.nan)
    assert torch.isnan(out.logprobs[~others]).all()
    assert torch.isfinite(out.logprobs[others]).all()
    assert torch.isfinite(out.values[others]).all()
    out = embed(0.0)
    (out.logprobs[others].sum() + out.values[others].sum()).backward()
    for embedding in embeddings[2:]:
        assert (embedding.grad[0, own] == 0).all()
        assert (embedding.grad[0, ~own] != 0).any()


def test_values_read_the_state_before_each_action() -> None:
    m = actor_critic(shared_body=True)
    batch = pack(random_rollouts([(4, 3)]))
    hidden = m.actor.hidden(batch)
    expected = m.critic.value_head(hidden).squeeze(-1)
    out = m(batch, temperature=1.0)
    torch.testing.assert_close(out.values, expected[[3, 4, 5]])
    torch.testing.assert_close(out.final_values, expected[[6]])


@pytest.mark.parametrize(("shared", "to_body"), [(True, True), (True, False), (False, True)])
def test_where_the_value_gradient_goes(shared: bool, to_body: bool) -> None:
    m = actor_critic(shared_body=shared, value_gradient_to_body=to_body)
    m(pack(random_rollouts([(4, 3)])), temperature=1.0).values.sum().backward()
    reached = any(p.grad is not None and p.grad.abs().sum() > 0 for p in m.actor.parameters())
    assert reached == (shared and to_body)
    assert m.critic.value_head.weight.grad is not None


def test_flash_is_refused_with_the_reason() -> None:
    assert "CUDA" in str(attention.can_use_flash(torch.device("cpu"), True))
    assert "bfloat16" in str(attention.can_use_flash(torch.device("cuda"), False))


def test_architectures_that_cannot_be_packed_are_refused() -> None:
    torch.manual_seed(0)
    config = t.MambaConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    lm = t.MambaForCausalLM(config).eval()
    with pytest.raises(UserError, match="cannot"):
        model.check_packed_forward(model.Actor(lm, ModelConfig(path="memory")))


def test_saved_policy_loads_in_plain_transformers(tiny_model: Path, tmp_path: Path) -> None:
    ac, tokenizer = model.build(ModelConfig(path=str(tiny_model)), "cpu")
    ac.actor.save(tmp_path / "out", tokenizer)
    plain = t.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, dict(ac.actor.named_weights())[name])
    assert t.AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == tokenizer.eos_token_id
    assert ac.actor.lm.config._attn_implementation == attention.NAME


def test_unreadable_models_get_one_sentence(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path = ''"):
        model.build(ModelConfig(), "cpu")
    with pytest.raises(UserError, match="no such folder"):
        model.build(ModelConfig(path=str(tmp_path / "nowhere")), "cpu")
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    (broken / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match="could be loaded"):
        model.build(ModelConfig(path=str(broken)), "cpu")
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_model, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="its weights are pickles"):
        model.build(ModelConfig(path=str(pickled)), "cpu")


def test_gradient_checkpointing_changes_nothing(tiny_model: Path) -> None:
    rollouts = random_rollouts([(9, 5), (3, 2)], vocab=280)
    gradients = []
    for on in (False, True):
        ac, _ = model.build(ModelConfig(path=str(tiny_model), gradient_checkpointing=on), "cpu")
        ac(pack(rollouts), temperature=1.0).logprobs.sum().backward()
        gradients.append([p.grad for p in ac.actor.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
