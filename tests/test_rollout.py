"""One conformance suite for every rollout engine, and what is special to each."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Client
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import EOS, no_vllm, prompt, tokenizer

from tppo_fast import config as settings
from tppo_fast import loading, model, packing, runs
from tppo_fast.child import Child
from tppo_fast.data_types import Prompt
from tppo_fast.errors import EngineError, EngineLost, UserError
from tppo_fast.rollout import RolloutEngine, SamplingParams, build_engine
from tppo_fast.rollout.hf_engine import HFEngine
from tppo_fast.rollout.remote import RemoteLive
from tppo_fast.rollout.scripted import ScriptedEngine

EngineMaker = Callable[[Path], RolloutEngine]


def hf(folder: Path) -> RolloutEngine:
    return HFEngine(loading.load_causal_lm(str(folder)), loading.load_tokenizer(str(folder)))


def scripted(folder: Path) -> RolloutEngine:
    """Answers what the Hugging Face engine would say first, so that the log-probabilities are real ones."""
    tok = tokenizer()
    inner = hf(folder)

    def script(prompt: Prompt, index: int) -> tuple[list[int], list[float]]:
        r = inner.generate([prompt], SamplingParams(max_new_tokens=12, n=index + 1, seed=7))[index]
        return list(r.token_ids), list(r.logprobs)

    engine = ScriptedEngine(script, decode=lambda ids: tok.decode(ids, skip_special_tokens=True), eos_token_ids=[EOS])
    publish = engine.load_weights

    def both(weights: Any, version: int) -> None:
        pairs = list(weights)
        publish(pairs, version)
        inner.load_weights(pairs, version)

    engine.load_weights = both  # type: ignore[method-assign]
    return engine


def vllm(folder: Path) -> RolloutEngine:
    values = {
        "threads": 1,
        "model": {"path": str(folder)},
        "data": {"max_prompt_tokens": 64},
        "rollout": {"engine": "vllm", "max_new_tokens": 12},
        "vllm": {"kv_cache_gib": 0.05},
    }
    return build_engine(settings.build(values), tokenizer(), torch.device("cpu"))


ENGINES = {"hf": hf, "scripted": scripted, "vllm": vllm}
needs_vllm = pytest.mark.skipif(no_vllm() is not None, reason=str(no_vllm()))


@pytest.fixture(scope="class", params=["hf", "scripted", pytest.param("vllm", marks=needs_vllm)])
def engine(request: pytest.FixtureRequest, wide_model: Path) -> Any:
    """One for all tests of the suite: the first finds it without weights, the last closes it."""
    with contextlib.closing(ENGINES[request.param](wide_model)) as made:
        yield made


@pytest.fixture(scope="module")
def actor(wide_model: Path) -> model.Actor:
    return model.build(settings.ModelConfig(path=str(wide_model)), "cpu")[0].actor


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    tok = tokenizer()
    texts = ["lisbon hotels", "pasta", "camera reviews, cheap flights to lisbon, tram map"]
    return [
        Prompt(token_ids=tok.encode(t), user_id=t, history=(t,), next_queries=("x",), relevant_queries=("x",))
        for t in texts
    ]


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 12, "n": 2, "seed": 7, **changes})


class TestConformance:
    """What every engine promises."""

    def test_refuses_to_generate_before_weights(self, engine: RolloutEngine, prompts: list[Prompt]) -> None:
        with pytest.raises(UserError, match="before load_weights"):
            engine.generate(prompts, params())

    def test_order_and_count(self, engine: RolloutEngine, actor: model.Actor, prompts: list[Prompt]) -> None:
        engine.load_weights(actor.named_weights(), version=3)
        rollouts = engine.generate(prompts, params(n=3))
        assert [r.prompt for r in rollouts] == [p for p in prompts for _ in range(3)]
        assert {r.policy_version for r in rollouts} == {3}

    def test_lengths_stop_and_text(self, engine: RolloutEngine, actor: model.Actor, prompts: list[Prompt]) -> None:
        tok = tokenizer()
        engine.load_weights(actor.named_weights(), version=0)
        for limit in (1, 12):
            for r in engine.generate(prompts, params(max_new_tokens=limit)):
                assert 1 <= len(r.token_ids) == len(r.logprobs) <= limit
                assert EOS not in r.token_ids[:-1]
                assert (r.finish_reason == "stop") == (r.token_ids[-1] == EOS)
                assert r.finish_reason == "stop" or len(r.token_ids) == limit
                assert r.text == tok.decode(list(r.token_ids), skip_special_tokens=True)

    def test_logprobs_are_the_policys(self, engine: RolloutEngine, actor: model.Actor, prompts: list[Prompt]) -> None:
        engine.load_weights(actor.named_weights(), version=0)
        rollouts = engine.generate(prompts, params())
        batch = packing.pack(rollouts, [r.logprobs for r in rollouts])
        with torch.no_grad():
            logp, _ = actor.logprobs(actor.hidden(batch)[batch.state_index], batch.actions, 1.0)
        torch.testing.assert_close(logp, batch.behaviour_logprobs, atol=1e-4, rtol=0)

    def test_same_seed_same_rollouts(self, engine: RolloutEngine, actor: model.Actor, prompts: list[Prompt]) -> None:
        engine.load_weights(actor.named_weights(), version=0)
        assert engine.generate(prompts, params()) == engine.generate(prompts, params())

    def test_publishing_is_by_value_and_complete(
        self, engine: RolloutEngine, actor: model.Actor, prompts: list[Prompt]
    ) -> None:
        weights = {name: tensor.clone() for name, tensor in actor.named_weights()}
        engine.load_weights(weights.items(), version=0)
        before = engine.generate(prompts, params())
        for tensor in weights.values():
            tensor.fill_(0.5)  # the trainer goes on; the engine must not notice
        assert engine.generate(prompts, params()) == before
        with pytest.raises(UserError, match="weight"):
            engine.load_weights(list(actor.named_weights())[1:], version=1)

    def test_does_not_disturb_the_global_generator(
        self, engine: RolloutEngine, actor: model.Actor, prompts: list[Prompt]
    ) -> None:
        engine.load_weights(actor.named_weights(), version=0)
        state = torch.get_rng_state()
        engine.generate(prompts, params())
        assert torch.equal(torch.get_rng_state(), state)

    def test_close_twice(self, engine: RolloutEngine) -> None:
        engine.close()
        engine.close()


def test_hf_logprobs_at_a_temperature(actor: model.Actor, wide_model: Path, prompts: list[Prompt]) -> None:
    engine = hf(wide_model)
    engine.load_weights(actor.named_weights(), version=0)
    for temperature, greedy in ((0.5, False), (2.0, False), (1.0, True)):
        rollouts = engine.generate(prompts, params(temperature=temperature, greedy=greedy))
        batch = packing.pack(rollouts, [r.logprobs for r in rollouts])
        with torch.no_grad():
            logp, _ = actor.logprobs(actor.hidden(batch)[batch.state_index], batch.actions, temperature)
        torch.testing.assert_close(logp, batch.behaviour_logprobs, atol=1e-4, rtol=0)


def test_greedy_decoding_has_no_temperature() -> None:
    with pytest.raises(UserError, match=r"temperature = 0\.7 with greedy = True.*; set temperature = 1\.0"):
        params(temperature=0.7, greedy=True)
    greedy = runs.eval_sampling(settings.build({"rollout": {"temperature": 0.7}, "train": {"eval_greedy": True}}))
    assert (greedy.greedy, greedy.temperature) == (True, 1.0)


def test_hf_samples_the_distribution_it_reports(actor: model.Actor, wide_model: Path, prompts: list[Prompt]) -> None:
    """First-token frequencies over many samples against exp(logprob): nothing was cut off or penalised."""
    engine = hf(wide_model)
    engine.load_weights(actor.named_weights(), version=0)
    rollouts = engine.generate(prompts[:1], params(n=4000, max_new_tokens=1))
    counts = torch.bincount(torch.tensor([r.token_ids[0] for r in rollouts]), minlength=300) / len(rollouts)
    ids = torch.tensor([[*prompts[0].token_ids]])
    plain = loading.load_causal_lm(str(wide_model)).eval()
    expected = plain(input_ids=ids).logits[0, -1].softmax(-1).detach()
    deviation = (counts[: len(expected)] - expected) / (expected * (1 - expected) / len(rollouts)).sqrt()
    assert deviation.abs().max() < 4.5  # standard errors, over some 290 tokens
    assert (counts > 0).sum() > 200


def test_hf_ignores_the_models_own_generation_settings(
    wide_model: Path, actor: model.Actor, prompts: list[Prompt]
) -> None:
    lm = loading.load_causal_lm(str(wide_model))
    lm.generation_config.top_k, lm.generation_config.repetition_penalty = 1, 3.0
    engine = HFEngine(lm, tokenizer())
    engine.load_weights(actor.named_weights(), version=0)
    first = {r.token_ids[0] for r in engine.generate(prompts[:1], params(n=50, max_new_tokens=1))}
    assert len(first) > 10


def test_hf_batches_do_not_change_what_is_asked(wide_model: Path, actor: model.Actor, prompts: list[Prompt]) -> None:
    engine = HFEngine(loading.load_causal_lm(str(wide_model)), tokenizer(), batch_size=2)
    engine.load_weights(actor.named_weights(), version=0)
    assert [r.prompt for r in engine.generate(prompts, params(n=3))] == [p for p in prompts for _ in range(3)]


@pytest.mark.parametrize("batch_size", [256, 3])
def test_hf_reads_a_prompt_once_for_all_its_samples(wide_model: Path, actor: model.Actor, batch_size: int) -> None:
    """The same samples as of repeated prompts, a prompt of one token among them; batches of 3 cut through samples of 4."""
    lm = loading.load_causal_lm(str(wide_model))
    engine = HFEngine(lm, tokenizer(), batch_size=batch_size)
    engine.load_weights(actor.named_weights(), version=0)
    read: list[int] = []
    lm.get_input_embeddings().register_forward_hook(lambda _, args, __: read.append(args[0].numel()))
    prompts = [prompt(ids) for ids in ([5, 6, 7] * 7, [9], [11, 12, 13], list(range(20, 50)))]
    sampled = engine.generate(prompts, params(n=4, max_new_tokens=3))
    if batch_size == 256:
        assert read == [4 * 29, 16, 16, 16]  # all tokens but the last, then one of each sample at a time
    repeated = engine.generate([p for p in prompts for _ in range(4)], params(n=1, max_new_tokens=3))
    assert [r.token_ids for r in sampled] == [r.token_ids for r in repeated]
    for mine, other in zip(sampled, repeated, strict=True):
        assert mine.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    short = [prompt([9]), prompt([7])]
    alone = engine.generate(short, params(n=2))
    assert [r.token_ids for r in alone] == [
        r.token_ids for r in engine.generate([short[0]] * 2 + [short[1]] * 2, params(n=1))
    ]


def test_hf_says_that_a_policy_is_not_finite(wide_model: Path, actor: model.Actor, prompts: list[Prompt]) -> None:
    engine = hf(wide_model)
    weights = {name: tensor.clone() for name, tensor in actor.named_weights()}
    weights["model.norm.weight"][0] = float("nan")
    engine.load_weights(weights.items(), version=0)
    with pytest.raises(EngineError, match=r"scores are not finite.*lower learning rate"):
        engine.generate(prompts, params())


def test_hf_names_what_does_not_fit(wide_model: Path, actor: model.Actor) -> None:
    engine = hf(wide_model)
    with pytest.raises(UserError, match="weight 'nonsense'"):
        engine.load_weights([("nonsense", torch.zeros(2))], version=0)
    name, tensor = next(iter(actor.named_weights()))
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        engine.load_weights([(name, tensor[:1])], version=0)


def test_hf_samples_nothing_from_half_a_policy(wide_model: Path, actor: model.Actor, prompts: list[Prompt]) -> None:
    engine = hf(wide_model)
    engine.load_weights(actor.named_weights(), version=3)
    with pytest.raises(UserError, match="was not published"):
        engine.load_weights([next(iter(actor.named_weights()))], version=4)
    with pytest.raises(UserError, match="before load_weights"):
        engine.generate(prompts, params())


def test_hf_refuses_what_the_model_has_no_positions_for(wide_model: Path, actor: model.Actor) -> None:
    engine = hf(wide_model)
    engine.load_weights(actor.named_weights(), version=0)
    with pytest.raises(UserError, match="may need 412 positions, the model has 256"):
        engine.generate([prompt([5] * 400)], params())


@pytest.mark.parametrize("bad", [{"top_p": 0.9}, {"top_k": 5}, {"temperature": 0.0}, {"n": 0}, {"max_new_tokens": 0}])
def test_sampling_that_biases_the_ratio_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        params(**bad)


def my_engine(config: Any, tokenizer: Any, device: Any) -> Any:
    assert config.rollout.engine == "test_rollout:my_engine"
    assert (tokenizer, device) == (None, torch.device("cpu"))
    nothing = lambda *_: None  # noqa: E731
    return SimpleNamespace(generate=lambda *_: 1 / 0, load_weights=nothing, close=nothing)


def no_engine(*_: Any) -> dict[str, Any]:
    return {}


def test_the_hf_engine_in_bfloat16_keeps_rotary_frequencies_wide(wide_model: Path) -> None:
    """As the trainer's autocast does: rounded, they would turn a distant position by a fraction of a radian."""
    made = settings.build({"model": {"path": str(wide_model), "dtype": "bfloat16"}})
    engine = build_engine(made, tokenizer(), torch.device("cpu"))
    lm = engine._lm  # type: ignore[attr-defined]
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}
    assert {b.dtype for name, b in lm.named_buffers() if "inv_freq" in name} == {torch.float32}


def test_build_engine(wide_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def config(engine: str) -> settings.Config:
        return settings.build({"model": {"path": str(wide_model)}, "rollout": {"engine": engine}})

    device = torch.device("cpu")
    assert isinstance(build_engine(config("hf"), tokenizer(), device), HFEngine)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    own = build_engine(config("test_rollout:my_engine"), None, device)
    with pytest.raises(UserError, match=r"rollout\.engine = 'test_rollout:my_engine' failed with ZeroDivisionError"):
        own.generate([], SamplingParams(max_new_tokens=1))
    with pytest.raises(UserError, match="returned a dict without a method generate: see RolloutEngine"):
        build_engine(config("test_rollout:no_engine"), None, device)
    with pytest.raises(UserError, match=r"rollout\.engine = 'vllmm'"):
        build_engine(config("vllmm"), tokenizer(), device)


DEAF = """
import time
from multiprocessing.connection import Listener
with Listener(("127.0.0.1", 0), authkey=b"x") as listener:
    print(listener.address[1], flush=True)
    connection = listener.accept()
    time.sleep(600)
"""


def test_a_worker_that_takes_nothing_in_is_lost_in_time() -> None:
    """More than the sockets hold is sent to it; without a deadline the write would never come back."""
    process = subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    live = object.__new__(RemoteLive)
    connection: Any = Client(("127.0.0.1", int(process.stdout.readline())), authkey=b"x")
    live._child = Child(process, "the rollout worker", b"x", [connection])  # type: ignore[arg-type]
    live._timeout, live._count = 1.0, 0
    with pytest.raises(EngineLost, match=r"took in nothing for 1 s"):
        live.generate([[7] * (4 << 20)], params(), [])
    live.close()
