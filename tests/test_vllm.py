"""Real vLLM: weights arrive whole and at once, log-probabilities agree, nothing old survives, no failure is silent."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import real_model
import torch
from support import no_vllm, tokenizer, wide_llama, write_model

from tppo_fast import config as settings
from tppo_fast import loading, model, packing
from tppo_fast.data_types import Prompt
from tppo_fast.errors import EngineError, UserError
from tppo_fast.rollout import RolloutEngine, SamplingParams, build_engine, publish

pytestmark = pytest.mark.skipif(no_vllm() is not None, reason=str(no_vllm()))


def config(folder: Path, **vllm: Any) -> settings.Config:
    return settings.build(
        {
            "threads": 1,
            "model": {"path": str(folder)},
            "data": {"max_prompt_tokens": 96},
            "rollout": {"engine": "vllm", "max_new_tokens": 12},
            "vllm": {"kv_cache_gib": 0.05, **vllm},
        }
    )


def build(folder: Path, **vllm: Any) -> Any:
    return build_engine(config(folder, **vllm), tokenizer(), torch.device("cpu"))


def load_actor(folder: Path, **changes: Any) -> model.Actor:
    return model.build(settings.ModelConfig(path=str(folder), **changes), "cpu")[0].actor


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / request.param
    write_model(path, lambda vocabulary: wide_llama(vocabulary, tied=request.param == "tied"))
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Any]:
    state = torch.get_rng_state()
    with contextlib.closing(build(folder)) as made:
        assert torch.equal(torch.get_rng_state(), state)
        yield made


@pytest.fixture
def actor(folder: Path) -> model.Actor:
    return load_actor(folder)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    shared = "cheap flights to lisbon, lisbon hotels, lisbon tram map, "  # more than one block of the prefix cache
    texts = ["pasta", 2 * shared + "camera", 2 * shared + "pasta"]
    tok = tokenizer()
    return [
        Prompt(token_ids=tok.encode(t), user_id=t, history=(t,), next_queries=("x",), relevant_queries=("x",))
        for t in texts
    ]


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 12, "n": 2, "seed": 7, **changes})


def gap(actor: model.Actor, engine: RolloutEngine, prompts: list[Prompt], sampling: SamplingParams) -> float:
    """Largest |engine - trainer| over the log-probabilities of new rollouts."""
    rollouts = engine.generate(prompts, sampling)
    batch = packing.pack(rollouts, [r.logprobs for r in rollouts])
    with torch.no_grad():
        states = actor.hidden(batch)[batch.state_index]
        logp, _ = actor.logprobs(states, batch.actions, sampling.temperature)
    return float((logp - batch.behaviour_logprobs).abs().max())


def disturb(actor: model.Actor, seed: int, size: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in actor.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))


def test_rounds_of_change_publish_generate(engine: Any, actor: model.Actor, prompts: list[Prompt]) -> None:
    texts = set()
    for version in range(20):
        disturb(actor, version)
        engine.load_weights(actor.named_weights(), version)
        assert gap(actor, engine, prompts, params(seed=version)) < 1e-3
        first = engine.generate(prompts[:1], params(n=1, seed=0))[0]
        assert first.policy_version == version
        texts.add(tuple(first.token_ids))
    assert len(texts) > 10  # the policies did differ


def test_a_policy_with_adapters_is_published_merged(engine: Any, folder: Path, prompts: list[Prompt]) -> None:
    pytest.importorskip("peft")
    adapted = load_actor(folder, lora_rank=4)
    engine.load_weights(adapted.named_weights(), 0)
    before = [r.token_ids for r in engine.generate(prompts, params())]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:  # the adapters alone
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    engine.load_weights(adapted.named_weights(), 1)
    assert gap(adapted, engine, prompts, params()) < 1e-3
    assert [r.token_ids for r in engine.generate(prompts, params())] != before


@pytest.mark.parametrize(("temperature", "greedy"), [(0.5, False), (2.0, False), (1.0, True)])
def test_logprobs_at_a_temperature(
    engine: Any, actor: model.Actor, prompts: list[Prompt], temperature: float, greedy: bool
) -> None:
    engine.load_weights(actor.named_weights(), 0)
    assert gap(actor, engine, prompts, params(temperature=temperature, greedy=greedy)) < 1e-4


def test_greedy_takes_the_most_likely_token_as_often_as_asked(
    engine: Any, actor: model.Actor, prompts: list[Prompt]
) -> None:
    engine.load_weights(actor.named_weights(), 0)
    rollouts = engine.generate(prompts, params(greedy=True, n=2))
    assert [r.prompt for r in rollouts] == [p for p in prompts for _ in range(2)]
    assert rollouts[0] == rollouts[1]
    ids = [*prompts[0].token_ids, *rollouts[0].token_ids]
    actor.lm.set_attn_implementation("sdpa")
    with torch.no_grad():
        best = actor.lm(input_ids=torch.tensor([ids])).logits[0].argmax(-1)
    assert best[len(prompts[0].token_ids) - 1 : -1].tolist() == list(rollouts[0].token_ids)


def test_samples_of_a_prompt_differ_and_seeds_matter(engine: Any, actor: model.Actor, prompts: list[Prompt]) -> None:
    engine.load_weights(actor.named_weights(), 0)
    same = [prompts[0], prompts[0]]
    first = [tuple(r.token_ids) for r in engine.generate(same, params(n=4))]
    assert len(set(first)) == 8
    assert first != [tuple(r.token_ids) for r in engine.generate(same, params(n=4, seed=8))]
    engine.generate(prompts, params(n=3))  # what was asked between does not matter
    assert first == [tuple(r.token_ids) for r in engine.generate(same, params(n=4))]


def test_more_prompt_tokens_than_one_forward_pass_takes(engine: Any, actor: model.Actor) -> None:
    """Prompts cut in two at vLLM's token budget broke seeded sampling on the CPU."""
    engine.load_weights(actor.named_weights(), 0)
    ids = torch.randint(1, 290, (150, 61), generator=torch.Generator().manual_seed(0)).tolist()
    many = [
        Prompt(token_ids=row, user_id="u", history=("a",), next_queries=("x",), relevant_queries=("x",)) for row in ids
    ]
    assert gap(actor, engine, many, params(max_new_tokens=2)) < 1e-3


def test_it_samples_the_distribution_it_reports(engine: Any, actor: model.Actor, prompts: list[Prompt]) -> None:
    engine.load_weights(actor.named_weights(), 0)
    rollouts = engine.generate(prompts[:1], params(n=4000, max_new_tokens=1))
    actor.lm.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = actor.lm(input_ids=torch.tensor([prompts[0].token_ids])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([r.token_ids[0] for r in rollouts]), minlength=len(expected)) / len(rollouts)
    deviation = (counts - expected) / (expected * (1 - expected) / len(rollouts)).sqrt()
    assert deviation[expected > 1e-3].abs().max() < 4.5  # standard errors


@pytest.mark.real_model
@pytest.mark.skipif(real_model.missing() is not None, reason=str(real_model.missing()))
def test_the_real_pretrained_model_in_a_worker() -> None:
    cache = Path(__file__).parents[1] / ".cache"
    cache.mkdir(exist_ok=True)
    path = real_model.convert(cache / "smollm2")
    actor, tok = load_actor(path), loading.load_tokenizer(str(path))
    ids = tok.encode("History:\nlisbon hotels | cheap flights to lisbon\nNext queries:")
    some = [Prompt(token_ids=ids, user_id="u", history=("a",), next_queries=("x",), relevant_queries=("x",))]
    with contextlib.closing(build_engine(config(path, process="worker"), tok, torch.device("cpu"))) as made:
        for version in range(2):
            made.load_weights(actor.named_weights(), version)
            assert gap(actor, made, some, params(n=4)) < 1e-3
            disturb(actor, version, size=1e-3)


# ---------------------------------------------------------------- failures that must not be silent


def test_a_skipped_publish_is_caught(engine: Any, actor: model.Actor, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.load_weights(actor.named_weights(), 0)
    disturb(actor, 1, size=1e-5)  # one small optimizer step
    monkeypatch.setattr(engine.live, "update", lambda _: None)
    with pytest.raises(EngineError, match=r"weight '.*' of the rollout engine is not the published one"):
        engine.load_weights(actor.named_weights(), 1)
    with pytest.raises(UserError, match="before load_weights"):
        engine.generate([], params())


@pytest.mark.parametrize(
    "lost", ["layers.1.self_attn.k_proj.weight", "layers.0.mlp.up_proj.weight", "norm.weight", "o_proj.weight"]
)
def test_one_lost_parameter_is_named(
    engine: Any, actor: model.Actor, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    engine.load_weights(actor.named_weights(), 0)
    old = {name: tensor.clone() for name, tensor in actor.named_weights()}
    disturb(actor, 2)
    send = engine.live.update

    def forgetful(bucket: Any) -> None:
        send([(name, old[name] if name.endswith(lost) else tensor) for name, tensor in bucket])

    monkeypatch.setattr(engine.live, "update", forgetful)
    with pytest.raises(EngineError, match=rf"weight '.*{lost.replace('.', '[.]')}'"):
        engine.load_weights(actor.named_weights(), 1)


def test_the_old_packed_head_is_caught(
    folder: Path, engine: Any, actor: model.Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap of tied embeddings on the CPU: the layerwise reload alone leaves the head's old packing."""
    if folder.name != "tied":
        pytest.skip("an untied head is packed again by the reload")
    from tppo_fast.rollout.vllm_engine import LocalTransfer

    engine.load_weights(actor.named_weights(), 0)
    monkeypatch.setattr(LocalTransfer, "_repack_tied_head", lambda _: None)
    disturb(actor, 3)
    with pytest.raises(EngineError, match=r"weight 'lm_head\.weight'"):
        engine.load_weights(actor.named_weights(), 1)


def test_the_probe_catches_what_fingerprints_do_not(
    engine: Any, actor: model.Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.load_weights(actor.named_weights(), 0)
    disturb(actor, 4)
    norm = dict(actor.named_weights())["model.norm.weight"]
    monkeypatch.setattr(engine.live, "update", lambda _: None)
    monkeypatch.setattr(engine.live, "fingerprint", lambda _: {"model.norm.weight": publish.fingerprint(norm)})
    with pytest.raises(EngineError, match=r"probe prompt are .* nats per token from the trainer's"):
        engine.load_weights(actor.named_weights(), 1)


def test_cached_prefixes_do_not_survive(engine: Any, actor: model.Actor, prompts: list[Prompt]) -> None:
    """The same prompts before and after an update; without the reset the second answer reads the first one's cache."""
    for version in range(3):
        disturb(actor, version, size=0.05)
        engine.load_weights(actor.named_weights(), version)
        assert gap(actor, engine, prompts[1:], params()) < 1e-3
        assert gap(actor, engine, prompts[1:], params()) < 1e-3


def test_without_the_reset_the_cache_would_lie(
    engine: Any, actor: model.Actor, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the test above can fail."""
    engine.load_weights(actor.named_weights(), 0)
    monkeypatch.setattr(engine.live, "_reset_cache", lambda: None)
    engine.generate(prompts[1:], params())
    disturb(actor, 5, size=0.1)
    engine.load_weights(actor.named_weights(), 1)
    assert gap(actor, engine, prompts[1:], params()) > 1e-2


def test_weights_arrive_in_bounded_buckets(engine: Any, actor: model.Actor, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    send = engine.live.update

    def counting(bucket: Any) -> None:
        sizes.append(sum(t.numel() * 4 for _, t in bucket))
        send(bucket)

    monkeypatch.setattr(engine.live, "update", counting)
    monkeypatch.setattr(engine, "_bucket_bytes", 100_000)
    engine.load_weights(actor.named_weights(), 0)
    largest = max(t.numel() * 4 for _, t in actor.named_weights())
    assert len(sizes) > 5
    assert max(sizes) <= max(100_000, largest)


def test_it_names_what_does_not_fit(engine: Any, actor: model.Actor) -> None:
    weights = dict(actor.named_weights())
    name = "model.norm.weight"
    with pytest.raises(UserError, match=r"weight 'model\.norm\.weight' of shape \(3,\)"):
        engine.load_weights({**weights, name: torch.zeros(3)}.items(), 0)
    with pytest.raises(UserError, match="weight 'nonsense'"):
        engine.load_weights({**weights, "nonsense": torch.zeros(3)}.items(), 0)
    del weights[name]
    with pytest.raises(UserError, match="was not published"):
        engine.load_weights(weights.items(), 0)


def test_an_update_that_broke_off_does_not_stop_the_next(
    engine: Any, actor: model.Actor, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.load_weights(actor.named_weights(), 0)
    disturb(actor, 6)
    send, sent = engine.live.update, []

    def failing(bucket: Any) -> None:
        if sent:
            raise EngineError("broken off")
        sent.append(send(bucket))

    monkeypatch.setattr(engine, "_bucket_bytes", 100_000)
    with monkeypatch.context() as patch:
        patch.setattr(engine.live, "update", failing)
        with pytest.raises(EngineError, match="broken off"):
            engine.load_weights(actor.named_weights(), 1)
    with pytest.raises(UserError, match="before load_weights"):
        engine.generate(prompts, params())
    engine.load_weights(actor.named_weights(), 2)
    assert gap(actor, engine, prompts, params()) < 1e-3


class BreaksOff:
    """Weights of which only those before the second layer's keys come: vLLM holds its queries back until all three are there."""

    def __init__(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self._weights = weights

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._weights:
            if name == "model.layers.1.self_attn.k_proj.weight":
                raise torch.cuda.OutOfMemoryError("no memory left")
            yield name, tensor


def test_a_failure_within_vllm_does_not_spoil_the_next_update(
    engine: Any, actor: model.Actor, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tppo_fast.rollout.vllm_engine import LocalTransfer

    engine.load_weights(actor.named_weights(), 0)
    disturb(actor, 7)
    receive = LocalTransfer.receive_weights

    def failing(self: Any, told: Any) -> None:
        receive(self, dataclasses.replace(told, weights=BreaksOff(told.weights)))

    monkeypatch.setattr(engine, "_bucket_bytes", 100_000)
    with monkeypatch.context() as patch:
        patch.setattr(LocalTransfer, "receive_weights", failing)
        with pytest.raises(EngineError, match=r"vLLM failed while taking in weights: .*no memory left"):
            engine.load_weights(actor.named_weights(), 1)
    disturb(actor, 8)
    engine.load_weights(actor.named_weights(), 2)
    assert gap(actor, engine, prompts, params()) < 1e-3


def test_tied_weights_that_differ_are_refused(folder: Path, engine: Any, actor: model.Actor) -> None:
    if folder.name != "tied":
        pytest.skip("the head is its own")
    weights = dict(actor.named_weights())
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1.0
    with pytest.raises(UserError, match="ties it"):
        engine.load_weights(weights.items(), 0)


def test_a_prompt_that_is_too_long_is_a_sentence(engine: Any, actor: model.Actor, prompts: list[Prompt]) -> None:
    engine.load_weights(actor.named_weights(), 0)
    with pytest.raises(UserError, match="started for 108"):
        engine.generate(prompts, params(max_new_tokens=100))


@pytest.mark.usefixtures("engine")
def test_the_process_stays_as_it_was(wide_model: Path) -> None:
    torch.set_num_threads(2)  # vLLM replaces this by a function that does nothing
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    with pytest.raises(UserError, match="one process can hold one vLLM engine"):
        build(wide_model)


def test_sleep_in_place_needs_a_gpu(wide_model: Path) -> None:
    with pytest.raises(UserError, match=r'vllm\.sleep = "discard"'):
        build(wide_model, sleep="discard")


def test_a_model_vllm_cannot_run_is_one_sentence(engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(engine.live), "_alive", False)
    write_model(tmp_path, lambda vocabulary: wide_llama(vocabulary))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.path = .*: vLLM cannot start with it \(.*weights") as caught:
        build(tmp_path)
    assert "\n" not in str(caught.value)
