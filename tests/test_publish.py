"""What is published is checked entry by entry, in the engine's own arithmetic."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import prompt, tokenizer, wide_llama, write_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from tppo_fast import config as settings
from tppo_fast import loading
from tppo_fast.errors import EngineError, UserError
from tppo_fast.rollout import build_engine, remote
from tppo_fast.rollout.base import SamplingParams
from tppo_fast.rollout.hf_engine import HFEngine
from tppo_fast.rollout.publish import LiveSettings, Policy, PublishedEngine, fingerprint


class Live:
    """A live engine that computes with transformers, in the dtype it is sent."""

    alive = True

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.weights: dict[str, Tensor] = {}
        self.deaf: tuple[str, ...] = ()

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, stop: Sequence[int]
    ) -> list[tuple[list[int], list[float]]]:
        del sampling
        return [([stop[0]], [-1.0]) for _ in prompts]

    def probe(self, token_ids: Sequence[int]) -> Tensor:
        del token_ids
        return self._policy.probe(self.weights)

    def start_update(self) -> None:
        pass

    def update(self, bucket: Sequence[tuple[str, Tensor]]) -> None:
        self.weights |= {name: tensor.clone() for name, tensor in bucket if not name.endswith(self.deaf)}

    def finish_update(self, version: int) -> None:
        pass

    def fingerprint(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        found = {name: fingerprint(self.weights[name]) for name in shapes if name in self.weights}
        return {name: values for name, values in found.items() if values is not None}

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        pass


def small_gpt2(vocab_size: int, positions: int = 64) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_embd=64, n_head=2, n_layer=1, n_positions=positions))


@pytest.fixture
def weights(wide_model: Path) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in loading.load_causal_lm(str(wide_model)).state_dict().items()}


@pytest.fixture
def engine(wide_model: Path) -> PublishedEngine:
    policy = Policy(str(wide_model), "bfloat16")
    return PublishedEngine(Live(policy), policy, tokenizer(), max_model_len=108)


def moved(weights: dict[str, Tensor], step: float) -> dict[str, Tensor]:
    """The weights after one update of every entry by ``step``, up or down."""
    generator = torch.Generator().manual_seed(0)
    new = {
        name: tensor + step * torch.randn(tensor.shape, generator=generator).sign() for name, tensor in weights.items()
    }
    return new | {"lm_head.weight": new["model.embed_tokens.weight"]}  # tied


@pytest.mark.parametrize("deaf", ["", "layers.1.self_attn.k_proj.weight", "layers.0.mlp.down_proj.weight"])
def test_in_bfloat16_a_publication_that_does_not_arrive_is_named(
    engine: PublishedEngine, weights: dict[str, Tensor], deaf: str
) -> None:
    """After one small step: the probe cannot tell the two policies apart."""
    engine.load_weights(weights.items(), 0)
    engine.live.deaf = (deaf,)  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match=rf"weight '.*{deaf}' of the rollout engine is not the published one"):
        engine.load_weights(moved(weights, 1e-5).items(), 1)


def test_in_bfloat16_a_step_that_rounding_swallows_is_no_error(
    engine: PublishedEngine, weights: dict[str, Tensor]
) -> None:
    halves = {name: tensor.bfloat16().float() for name, tensor in weights.items()}
    engine.load_weights(halves.items(), 0)
    after = moved(halves, 1e-12)
    assert not torch.equal(after["model.embed_tokens.weight"], halves["model.embed_tokens.weight"])
    engine.live.deaf = ("",)  # type: ignore[attr-defined]
    engine.load_weights(after.items(), 1)


def test_weights_that_vllm_transposes_are_compared_as_it_has_them(tmp_path: Path) -> None:
    """GPT-2 keeps [in, out]: its square ones would be compared by row with a column."""
    write_model(tmp_path, small_gpt2)
    policy = Policy(str(tmp_path), "float32")
    named = policy.checked(loading.load_causal_lm(str(tmp_path)).state_dict().items())
    turned = {n: t.t() if t.ndim == 2 and ".h." in n else t for n, t in named.items()}  # what vLLM holds

    class Transposed(Live):
        def fingerprint(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
            assert shapes == {name: tuple(t.shape) for name, t in turned.items()}
            return {name: f for name, t in turned.items() if (f := fingerprint(t)) is not None}

    live = Transposed(policy)
    live.weights = named
    policy.verify(named, live)
    turned["transformer.h.0.attn.c_proj.weight"] = turned["transformer.h.0.attn.c_proj.weight"] + 1e-3
    with pytest.raises(EngineError, match=r"h\.0\.attn\.c_proj\.weight"):
        policy.verify(named, live)


@pytest.mark.parametrize(
    ("length", "said"),
    [(250, "need 262 positions, the model has 256: shorten prompts"), (100, "was started for 108: raise")],
)
def test_a_prompt_that_is_too_long_is_told_by_the_limit_it_passes(
    engine: PublishedEngine, weights: dict[str, Tensor], length: int, said: str
) -> None:
    engine.load_weights(weights.items(), 0)
    with pytest.raises(UserError, match=said):
        engine.generate([prompt([1] * length)], SamplingParams(max_new_tokens=12))


@pytest.mark.parametrize(("positions", "tokens", "probe"), [(256, 25, 24), (16, 16, 15)])
def test_an_engine_for_short_answers_can_be_probed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, positions: int, tokens: int, probe: int
) -> None:
    """Which asks for 24 tokens and one more, or for as many as the model has positions."""
    write_model(tmp_path, lambda vocabulary: small_gpt2(vocabulary, positions))
    asked: list[LiveSettings] = []

    def start(told: LiveSettings, **_: Any) -> Live:
        asked.append(told)
        return Live(Policy(told.path, told.dtype))

    monkeypatch.setattr(remote, "RemoteLive", start)
    values = {"model": {"path": str(tmp_path)}, "data": {"max_prompt_tokens": 8}, "vllm": {"process": "worker"}}
    run = settings.build({**values, "rollout": {"engine": "vllm", "max_new_tokens": 4}})
    made: Any = build_engine(run, tokenizer(), torch.device("cpu"))
    assert asked[0].max_model_len == tokens
    assert len(made._policy.probe_ids) == probe
    made._policy.probe(loading.load_causal_lm(str(tmp_path)).state_dict())


@pytest.mark.parametrize(("generation", "expected"), [(None, [0, 5, 7]), ({"eos_token_id": 6}, [0, 6])])
def test_every_engine_stops_at_the_same_tokens(tmp_path: Path, generation: Any, expected: list[int]) -> None:
    """A folder without generation settings: what config.json says counts, as in transformers."""
    write_model(tmp_path, wide_llama)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "eos_token_id": [5, 7]}))
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    policy = Policy(str(tmp_path), "float32")
    assert PublishedEngine(Live(policy), policy, tokenizer(), max_model_len=64)._stop == expected
    assert HFEngine(loading.load_causal_lm(str(tmp_path)), tokenizer())._eos == expected
