"""Engines and losses of a user that do not keep their side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import prompt, tokenizer
from test_ppo import build
from test_trainer import config

from tppo_fast import loading, losses, trainer
from tppo_fast.data_types import LossOutput, Rollout
from tppo_fast.errors import UserError
from tppo_fast.rollout import SamplingParams
from tppo_fast.rollout.hf_engine import HFEngine
from tppo_fast.rollout.plug_in import PlugIn

PROMPTS = [prompt([i, 2]) for i in range(4)]
CHANGES: dict[str, Any] = {
    "as it is": lambda rs: rs,
    "tensors": lambda rs: [
        replace(r, token_ids=torch.tensor(r.token_ids), logprobs=np.array(r.logprobs), prompt=replace(r.prompt))
        for r in rs
    ],
    "seven": lambda rs: rs[:7],
    "none": lambda _: None,
    "another order": lambda rs: rs[::-1],
    "floats": lambda rs: [replace(r, token_ids=[float(t) for t in r.token_ids]) for r in rs],
    "beyond": lambda rs: [replace(r, token_ids=[300 for _ in r.token_ids]) for r in rs],
    "negative": lambda rs: [replace(r, token_ids=[-1 for _ in r.token_ids]) for r in rs],
    "empty": lambda rs: [replace(r, token_ids=[], logprobs=[]) for r in rs],
    "long": lambda rs: [replace(r, token_ids=[1] * 9, logprobs=[0.0] * 9) for r in rs],
    "no logprobs": lambda rs: [replace(r, logprobs=None) for r in rs],
    "nan": lambda rs: [replace(r, logprobs=[float("nan") for _ in r.logprobs]) for r in rs],
    "few logprobs": lambda rs: [replace(r, logprobs=r.logprobs[1:]) for r in rs],
    "no text": lambda rs: [replace(r, text=None) for r in rs],
    "eos": lambda rs: [replace(r, finish_reason="eos") for r in rs],
    "version": lambda rs: [replace(r, policy_version=9) for r in rs],
}


def answered(name: str, folder: Path) -> list[Rollout]:
    """What an engine answers four prompts with whose every answer is changed so."""
    lm = loading.load_causal_lm(str(folder))
    own = HFEngine(loading.load_causal_lm(str(folder)), tokenizer())
    generate = own.generate
    own.generate = lambda *asked: CHANGES[name](generate(*asked))  # type: ignore[method-assign]
    engine = PlugIn(own, "rollout.engine = 'mine:engine'", 300)
    engine.load_weights(lm.state_dict().items(), 3)
    return engine.generate(PROMPTS, SamplingParams(n=2, max_new_tokens=8, seed=1))


def test_tensors_and_arrays_of_an_engine_become_lists(tiny_model: Path) -> None:
    taken = answered("tensors", tiny_model)
    assert taken == answered("as it is", tiny_model)
    assert taken[0].prompt is PROMPTS[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("seven", "answered 4 prompts with 7 rollouts that are not 2 of each"),
        ("none", "generate returned a NoneType: give a list of Rollouts"),
        ("another order", "in the prompts' order"),
        ("floats", "rollout 0 has token_ids that are no list of integers"),
        ("beyond", "a token outside the vocabulary of 300"),
        ("negative", "a token outside the vocabulary of 300"),
        ("empty", "has 0 tokens, and between 1 and max_new_tokens = 8"),
        ("long", "has 9 tokens, and between 1 and max_new_tokens = 8"),
        ("no logprobs", "finite numbers, one for each token"),
        ("nan", "finite numbers, one for each token"),
        ("few logprobs", "finite numbers, one for each token"),
        ("no text", "text = None"),
        ("eos", "finish_reason = 'eos'"),
        ("version", "policy_version = 9, and load_weights was given 3"),
    ],
)
def test_an_engine_that_does_not_answer_what_it_was_asked(tiny_model: Path, name: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        answered(name, tiny_model)
    assert str(caught.value).startswith("rollout.engine = 'mine:engine'")


def test_an_engine_that_empties_what_it_is_given_is_named(tiny_model: Path) -> None:
    """The same list is what its answer is checked against, and the held-out prompts last a whole run."""
    own = HFEngine(loading.load_causal_lm(str(tiny_model)), tokenizer())
    own.generate = lambda prompts, _: [prompts.pop() for _ in range(len(prompts))] and []  # type: ignore[attr-defined, method-assign]
    given = list(PROMPTS)
    with pytest.raises(UserError, match=r"^rollout\.engine = 'mine:engine' failed with AttributeError"):
        PlugIn(own, "rollout.engine = 'mine:engine'", 300).generate(given, SamplingParams(max_new_tokens=8, seed=1))
    assert given == PROMPTS


def unfinished_in_evaluations(config: Any, tokenizer: Any, device: Any) -> Any:
    del device
    engine = HFEngine(loading.load_causal_lm(config.model.path), tokenizer)
    generate = engine.generate
    engine.generate = lambda asked, sampling: generate(asked, sampling)[: 8 if sampling.n > 1 else 1]  # type: ignore[method-assign]
    return engine


def test_evaluations_check_what_an_engine_answered_too(tiny_model: Path, tmp_path: Path) -> None:
    engine = "test_user_code:unfinished_in_evaluations"
    with pytest.raises(UserError, match="answered 4 prompts with 1 rollouts"):
        trainer.train(config(tiny_model, tmp_path / "r", rollout__engine=engine))


def policy_alone(evaluation: Any, batch: Any, *_: Any) -> LossOutput:
    """No value term, no metrics."""
    return LossOutput(loss=-(evaluation.logprobs * batch.advantages).sum(), metrics={})


LOSSES: dict[str, Any] = {
    "meddling": lambda out: replace(out, metrics=out.metrics | {"actions": out.loss.detach()}),
    "number": lambda out: replace(out, metrics=out.metrics | {"mine": 1.0}),
    "vector": lambda out: replace(out, metrics=out.metrics | {"mine": out.loss.expand(3)}),
    "no metrics": lambda out: replace(out, metrics=None),
    "per token": lambda out: replace(out, loss=out.loss.expand(3)),
    "float": lambda out: replace(out, loss=1.0),
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meddling", r"has a metric 'actions' of shape \[\]: give .* under a name other than"),
        ("number", r"has a metric 'mine' = 1\.0: give a tensor"),
        ("vector", r"has a metric 'mine' of shape \[3\]: give a tensor without axes"),
        ("no metrics", r"metrics that are a NoneType: return a dict"),
        ("per token", r"returned a loss of shape \[3\]: return the sum"),
        ("float", r"returned a loss that is a float"),
    ],
)
@pytest.mark.parametrize("mark", [losses.row_local, lambda loss: loss], ids=["row-local", "whole"])
def test_mistakes_of_a_loss_are_one_sentence(name: str, expected: str, mark: Any) -> None:
    ppo, batch = build()
    ppo.loss = mark(lambda *args: LOSSES[name](losses.ppo(*args)))
    with pytest.raises(UserError, match=rf"^ppo\.loss = 'ppo' .*{expected}"):
        ppo.update(ppo.prepare(batch)[0])


def test_a_loss_without_a_gradient_is_refused() -> None:
    ppo, batch = build()
    ppo.loss = lambda *_: LossOutput(loss=torch.zeros(()), metrics={})
    with pytest.raises(UserError, match=r"ppo\.loss = 'ppo' returned a loss without a gradient"):
        ppo.update(ppo.prepare(batch)[0])


@pytest.mark.parametrize("mark", [losses.row_local, lambda loss: loss], ids=["row-local", "whole"])
def test_a_loss_without_a_value_term_waits_for_the_end_of_value_warm_up(mark: Any) -> None:
    ppo, batch = build(value_warmup_steps=1, kl_placement="off")
    ppo.loss = mark(lambda *args: policy_alone(*args))
    before = [p.clone() for p in ppo.model.parameters()]
    metrics = ppo.update(ppo.prepare(batch)[0])
    assert all(map(torch.equal, before, ppo.model.parameters()))
    assert "ppo/ess" not in metrics  # the loss reported no ratio
    ppo.update(ppo.prepare(batch)[0])
    assert not all(map(torch.equal, before, ppo.model.parameters()))
