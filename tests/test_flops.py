"""FLOPs by the models' sizes against torch's own counter, and what the log says of speed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import actor_critic, random_rollouts, tiny_llama
from test_ppo import build
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

from tppo_fast import clock, flops, packing


def batch_of(share: bool) -> packing.RolloutBatch:
    rollouts = random_rollouts([(20, 5), (9, 7)], n=3)
    return packing.pack(rollouts, [[0.0] * len(r.token_ids) for r in rollouts], share_prompts=share)


def test_linear_layers_and_head_are_what_torch_counts() -> None:
    """Attention aside, which torch does not count on a CPU."""
    actor = actor_critic().actor
    cost = flops.costs(actor.body, actor.lm.get_output_embeddings())
    ids = torch.arange(24)[None]
    with FlopCounterMode(display=False) as counted:
        out = actor.lm(input_ids=ids, position_ids=ids, use_cache=False, layout=layout(ids))
    small = 2 * 24 * 8 / 2 * 1  # rotary angles: a product with the positions
    forward = counted.get_total_flops()
    assert cost.token * 24 + cost.action * 24 == pytest.approx(forward - small, rel=0.01)
    with FlopCounterMode(display=False) as counted:
        out.logits.sum().backward()
    assert cost.token_backward * 24 + cost.action_backward * 24 == pytest.approx(counted.get_total_flops(), rel=0.01)


def layout(ids: torch.Tensor):
    from tppo_fast.attention import Segments, build_layout

    return build_layout(Segments(ids[0], torch.tensor([0, ids.shape[1]]), torch.tensor([-1])))


def test_frozen_weights_need_no_gradient_and_tables_are_free() -> None:
    lm = tiny_llama(300)
    whole = flops.costs(lm.base_model, lm.lm_head)
    assert whole.token_backward == 2 * whole.token
    lm.requires_grad_(False)
    frozen = flops.costs(lm.base_model, lm.lm_head)
    assert frozen.token == whole.token == frozen.token_backward
    assert frozen.action_backward == frozen.action == 2 * 300 * 32
    matrices = sum(p.numel() for p in lm.model.layers.parameters() if p.dim() == 2)
    assert whole.token == 2 * matrices


@pytest.mark.parametrize("share", [False, True])
def test_visible_pairs_are_those_of_the_mask(share: bool) -> None:
    expected = 3 * (25 * 26 // 2) + 3 * (16 * 17 // 2)
    if share:
        expected = (20 * 21 // 2 + 3 * (5 * 6 // 2 + 5 * 20)) + (9 * 10 // 2 + 3 * (7 * 8 // 2 + 7 * 9))
    assert flops.visible_pairs(batch_of(share)) == expected


def body(name: str, **sizes: object) -> torch.nn.Module:
    """Two layers of 32 hidden units, 100 tokens of vocabulary, without storage."""
    base = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 100,
    }
    with torch.device("meta"):
        return AutoModel.from_config(AutoConfig.for_model(name, **base, num_key_value_heads=2, **sizes))


def test_latent_attention_and_experts_by_hand() -> None:
    """DeepSeek-V3: keys of 8 + 4 numbers, values of 6; a layer of its own width, one of 4 experts of which 2 are visited."""
    deepseek = body(
        "deepseek_v3", q_lora_rank=16, kv_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6,
        n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=16, first_k_dense_replace=1,
        n_group=2, topk_group=1,
    )  # fmt: skip
    found = flops.costs(deepseek)
    assert found.pair == 2 * 2 * 2 * (8 + 4 + 6)  # FLOPs, layers, heads
    attention = 32 * 16 + 16 * 2 * 12 + 32 * (10 + 4) + 10 * 2 * (8 + 6) + 2 * 6 * 32
    experts = (2 + 1) * 3 * 32 * 16 + 4 * 32  # two visited and the shared one; the router
    assert found.token == 2 * (2 * attention + 3 * 32 * 48 + experts)
    with torch.device("meta"):
        real = AutoConfig.for_model("deepseek_v3", num_attention_heads=8, num_hidden_layers=1)
    assert 2 * real.num_attention_heads * flops._head_sizes(real) == 5120


@pytest.mark.parametrize(
    ("name", "sizes", "windows"),
    [
        ("llama", {}, (None, None)),
        ("mistral", {"sliding_window": 7}, (7, 7)),
        ("gemma2", {"sliding_window": 7, "head_dim": 16}, (7, None)),
        ("qwen2", {"sliding_window": 7, "use_sliding_window": False}, (None, None)),
    ],
)
def test_layers_with_a_window_are_known(name: str, sizes: dict[str, object], windows: tuple[int | None, ...]) -> None:
    assert flops.costs(body(name, **sizes)).windows == windows


@pytest.mark.parametrize("share", [False, True])
def test_a_window_hides_pairs(share: bool) -> None:
    """Queries past the seventh place look at 7 keys, wherever their prompt lies; half of the layers see all."""
    prompts = [(20, 5), (9, 7)]
    near = [sum(min(q + 1, 7) for q in range(start, end)) for p, r in prompts for start, end in ((0, p), (p, p + r))]
    expected = sum(near[::2]) * (1 if share else 3) + 3 * sum(near[1::2])
    batch = batch_of(share)
    assert flops.visible_pairs(batch, (7,)) == expected
    assert flops.visible_pairs(batch, (7, None)) == (expected + flops.visible_pairs(batch)) / 2


def test_a_models_windows_count_in_its_phases() -> None:
    found = {}
    for window in (None, 7):
        ppo, batch = build(epochs=1)
        ppo._counter._policy = replace(ppo._counter._policy, windows=(window, window))
        found[window] = ppo.prepare(batch)[1]["perf/prepare_tflop"]
    assert found[7] < found[None]


def test_sharing_prompts_saves_what_it_says_and_splitting_them_is_waste() -> None:
    """The same work is needed in one pass or in many; a prompt that is read twice shows up as waste."""
    found = {}
    for name, share, budget in [("unshared", False, 10_000), ("shared", True, 10_000), ("split", True, 26)]:
        ppo, batch = build([(20, 5), (9, 7)], n=3, share=share, microbatch_tokens=budget, epochs=2)
        train, prepared = ppo.prepare(batch)
        found[name] = {**prepared, **ppo.update(train)}
    tokens = 20 + 9 + 3 * (5 + 7)
    assert found["shared"]["perf/prepare_tokens"] == tokens
    assert found["shared"]["perf/update_tokens"] == 2 * tokens
    assert found["unshared"]["perf/update_tokens"] == 2 * 3 * (25 + 16)
    assert found["shared"]["perf/update_tflop"] < 0.7 * found["unshared"]["perf/update_tflop"]
    assert found["shared"]["perf/padding_waste"] == found["unshared"]["perf/padding_waste"] == 0.0
    assert found["split"]["perf/padding_waste"] > 0.2


def test_value_warmup_needs_only_the_critics_gradients() -> None:
    found = []
    for warmup in (0, 1):
        ppo, batch = build(value_warmup_steps=warmup, epochs=1)
        found.append(ppo.update(ppo.prepare(batch)[0])["perf/update_tflop"])
    assert found[1] < 0.75 * found[0]


def test_the_clock_turns_counts_into_rates() -> None:
    watch = clock.Clock()
    for phase in ("rollout", "prepare", "update"):
        with watch(phase):
            pass
    watch._seconds.update({"rollout": 2.0, "prepare": 0.5, "update": 4.0})
    counted = {
        "perf/prepare_tokens": 100.0,
        "perf/prepare_tflop": 1.0,
        "perf/update_tokens": 200.0,
        "perf/update_tflop": 8.0,
    }
    found = watch.metrics(60, counted, peak_rate=10e12)
    assert found["perf/rollout_tokens_per_second"] == 30.0
    assert found["perf/prepare_tokens_per_second"] == 200.0
    assert found["perf/update_tokens_per_second"] == 50.0
    assert found["perf/prepare_mfu"] == pytest.approx(0.2)
    assert found["perf/update_mfu"] == pytest.approx(0.2)


def test_a_rate_is_measured_where_no_datasheet_is_known() -> None:
    rate = flops.peak_rate(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e14
    assert flops.peak_rate(torch.device("cpu"), torch.float32) == rate  # measured once
