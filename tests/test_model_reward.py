"""The reward model in the loop: one score per content, any pair of tokenizers, every value and scale, and a run on it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
from support import letter_by_letter, prompt, rollout, tokenizer

from tppo_fast import config as settings
from tppo_fast import trainer
from tppo_fast.config import RewardConfig
from tppo_fast.data.sessions import Session, write_sessions
from tppo_fast.data_types import Rollout
from tppo_fast.errors import UserError
from tppo_fast.hashing import user_hash
from tppo_fast.metrics import read_metrics
from tppo_fast.reward_model.data import split
from tppo_fast.reward_model.run import train_reward_model
from tppo_fast.reward_model.settings import LabelsConfig, RewardModelConfig
from tppo_fast.rewards import ClassProbabilities, TokenRewards, build_reward, related, token_spans
from tppo_fast.rewards.copies import repeated_queries
from tppo_fast.rewards.model_source import ModelReward, warn_of_known_users
from tppo_fast.rewards.token_model import load
from tppo_fast.rewards.values import gap, prefix_means, sentence_value, token_values
from tppo_fast.runs import load_sessions
from tppo_fast.sections import build_section

P = torch.tensor([[0.1, 0.2, 0.7], [0.8, 0.15, 0.05], [0.0, 0.75, 0.25], [1.0, 0.0, 0.0]])
SCORES = ClassProbabilities(values=P)


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A causal and a bidirectional one, hardly trained, with tokenizers that are not the policy's."""
    folder = tmp_path_factory.mktemp("rm")
    labels = planted.write(folder / "labels.jsonl", 300)
    made = {}
    for kind in ("decoder", "encoder"):
        values = {
            "run_dir": str(folder / kind),
            "resamples": 20,
            "backbone": {"scratch": kind},
            "data": {"labels": str(labels)},
            "train": {"epochs": 1, "batch_size": 32},
        }
        made[kind] = train_reward_model(build_section(values, RewardModelConfig)).folder
    return made


def sampled(texts: list[str], history: tuple[str, ...] = ("lisbon",)) -> list[Rollout]:
    tok = tokenizer()
    where = replace(prompt([1, 2]), history=history)
    return [replace(rollout(where, [*tok(t).input_ids, tok.eos_token_id]), text=t) for t in texts]


def reward(folder: Path, **values: Any) -> TokenRewards:
    config = RewardConfig(source="model", model=str(folder), length_penalty=False, **values)
    return build_reward(config, tokenizer(), expected_length=0.0, separator=", ")


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"value": "argmax", "scale": "paper"}, [2.0, 0.0, 1.0, 0.0]),
        ({"value": "argmax", "scale": "binary"}, [1.0, 0.0, 0.0, 0.0]),
        ({"value": "argmax", "scale": "centred"}, [1.0, 0.0, -1.0, 0.0]),
        ({"value": "soft", "scale": "paper"}, [1.6, 0.25, 1.25, 0.0]),
        ({"value": "soft", "scale": "binary"}, [0.7, 0.05, 0.25, 0.0]),
        ({"value": "soft", "scale": "centred"}, [0.5, -0.1, -0.5, 0.0]),
        ({"value": "tlcr"}, [2 * 0.7 / 0.9 - 1, 0.0, -0.5, 0.0]),
        ({"value": "red", "scale": "binary"}, [0.7 / 0.9, 0.75 / 1.1 - 0.7 / 0.9, 1.0 / 2.1 - 0.75 / 1.1, 0.0]),
        ({"value": "red", "scale": "binary", "red_share": 0.0}, [0.0, 0.0, 0.0, 1.0 / 2.1]),
    ],
)
def test_values(settings: dict[str, Any], expected: list[float]) -> None:
    found = token_values(SCORES, RewardConfig(source="model", **settings))
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "cost"),
    [
        ({"value": "argmax", "scale": "paper"}, 1.0),
        ({"value": "soft", "scale": "centred"}, 2.0),
        ({"value": "tlcr", "scale": "paper"}, 2.0),
        ({"value": "red", "scale": "binary"}, 1.0),
    ],
)
def test_what_a_relevant_token_pays_more(settings: dict[str, Any], cost: float) -> None:
    assert gap(RewardConfig(source="model", **settings)) == cost


def test_the_sentence_is_the_mean_of_its_words() -> None:
    assert float(sentence_value(SCORES, RewardConfig(scale="binary"))) == pytest.approx(1.0 / 2.1)
    assert prefix_means(torch.tensor([0.0, 3.0]), torch.tensor([0.0, 1.0])).tolist() == [0.0, 3.0]
    made = TokenRewards(
        source=lambda rollouts: [SCORES for _ in rollouts],
        config=RewardConfig(source="m:f", scale="binary", placement="sentence"),
        tokenizer=tokenizer(),
        expected_length=9.0,
    )
    given = rollout(prompt([1]), [1, 2, 3, 4])
    (found,) = made([replace(given, text=tokenizer().decode(given.token_ids))])
    assert found.tolist() == pytest.approx([0.0, 0.0, 0.0, 1.0 / 2.1])


def test_probabilities_are_checked() -> None:
    def bad(rollouts: list[Rollout]) -> list[Any]:
        return [SCORES, 1.0] if len(rollouts) == 2 else [SCORES]

    made = TokenRewards(source=bad, config=RewardConfig(source="m:f"), tokenizer=tokenizer(), expected_length=9.0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="one kind for all"):
        made([rollout(prompt([1]), [1, 2, 3, 4])] * 2)
    with pytest.raises(UserError, match=r"expected finite ones of shape \[2, 3\]"):
        made([rollout(prompt([1]), [1, 2])])


# ---------------------------------------------------------------- scoring


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_scores_reach_the_policys_tokens(reward_models: dict[str, Path], kind: str) -> None:
    made = reward(reward_models[kind], value="soft")
    rollouts = sampled([" hotels price, book", " tent", ""])
    rewards, classes = made.explain(rollouts)
    assert [len(r) for r in rewards] == [len(r.token_ids) for r in rollouts]
    assert classes is not None
    assert all(c[-1] == 0 for c in classes)  # the end token has no text
    assert all(float(r[-1]) == 0.0 for r in rewards)
    text = [tokenizer().decode([i]).strip() for i in rollouts[0].token_ids[:-1]]
    assert [float(r) > 0.0 for r in rewards[0][:-1]] == [
        bool(t) for t in text
    ]  # a lone space is a separator for certain
    model, _ = load(str(reward_models[kind]), "cpu")
    (one,) = model.reader([["lisbon"]], [" tent"])
    (own,) = model.probabilities([one], 4096)
    assert len(own) == 1  # one token there, several here: all of them get its value
    value = float(own[0] @ torch.tensor([0.0, 1.0, 2.0]))
    visible = [bool(tokenizer().decode([i]).strip()) for i in rollouts[1].token_ids[:-1]]
    assert rewards[1][:-1].tolist() == pytest.approx([value * v for v in visible], abs=1e-5)


def test_each_content_is_scored_once_a_step(reward_models: dict[str, Path]) -> None:
    """And anew in the next one: what a score was computed with shows in its last bits, and a resumed run has no memory."""
    model, _ = load(str(reward_models["decoder"]), "cpu")
    source = ModelReward(model, token_budget=64)
    rollouts = sampled([" tent", " hotels", " tent"])
    first = source(rollouts)
    assert source.scored == 2
    assert torch.equal(first[0].values, first[2].values)
    later = sampled([" hotels", " tent", " book", " price, tent"])
    found = source(later)
    assert source.scored == 6
    fresh = ModelReward(model, token_budget=64)(later)
    assert all(torch.equal(a.values, b.values) for a, b in zip(found, fresh, strict=True))
    source([*sampled([" tent"]), *sampled([" tent"], history=("chess",))])
    assert source.scored == 8


def test_repeated_queries_are_irrelevant_whatever_the_model_says(reward_models: dict[str, Path]) -> None:
    assert repeated_queries(" a, Lisbon , b,a,, c", ["lisbon"], ", ") == [(3, 11), (15, 16)]
    rollouts = sampled([" tent, Lisbon, book, tent"], history=("lisbon",))
    plain, strict = (
        reward(reward_models["decoder"], value="soft", scale="centred", reject_copies=on)(rollouts)[0]
        for on in (False, True)
    )
    text, spans = token_spans(tokenizer(), rollouts[0].token_ids)
    repeated = [any(a < end and b > start for a, b in [(6, 13), (20, 25)]) for start, end in spans]
    assert text[6:13] == " Lisbon"
    assert any(repeated)
    ends = {next(i for i, (a, b) in enumerate(spans) if a <= 13 < b), len(spans) - 1}  # the comma; the response's end
    for i, (before, after, wrong) in enumerate(zip(plain.tolist(), strict.tolist(), repeated, strict=True)):
        assert after <= 0.0 if wrong else after == pytest.approx(before - 2.0 * (i in ends))
    assert (strict < plain)[torch.tensor(repeated)].any()
    cut = [replace(rollouts[0], token_ids=rollouts[0].token_ids[:-1], logprobs=[0.0], finish_reason="length")]
    (found,) = reward(reward_models["decoder"], value="soft", scale="centred", reject_copies=True)(cut)
    assert torch.equal(found, strict[:-1])  # nobody ended it: no token pays for that


@pytest.mark.parametrize("value", ["argmax", "soft", "tlcr", "red"])
@pytest.mark.parametrize("placement", ["token", "sentence"])
def test_paid_by_the_word_the_models_reward_does_not_depend_on_the_spelling(
    reward_models: dict[str, Path], value: str, placement: str
) -> None:
    (short,) = sampled([" hotels price, lisbon, book"])
    long = letter_by_letter(short, tokenizer())
    assert len(long.token_ids) > len(short.token_ids) + 5
    made = reward(
        reward_models["decoder"], value=value, placement=placement, scale="binary", per="word", reject_copies=True
    )
    found = made([short, long, *sampled(["", " , ,"])])
    assert float(found[0].sum()) == pytest.approx(float(found[1].sum()), abs=1e-5)
    assert found[0].any()
    assert not found[2].any()
    assert not found[3].any()


def test_a_causal_reward_is_never_taken_back(reward_models: dict[str, Path]) -> None:
    short, long = sampled([" hotels price", " hotels price, tent book"])
    causal = reward(reward_models["decoder"], value="soft")([short, long])
    kept = len(short.token_ids) - 2  # the last token before the end may merge with what follows
    assert torch.allclose(causal[0][:kept], causal[1][:kept], atol=1e-5)
    hindsight = reward(reward_models["encoder"], value="soft")([short, long])
    assert not torch.allclose(hindsight[0][:kept], hindsight[1][:kept], atol=1e-5)


def test_what_cannot_work_is_said(reward_models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs reward\.model"):
        build_reward(RewardConfig(source="model"), tokenizer(), expected_length=1.0, separator=", ")
    with pytest.raises(UserError, match="no reward model could be loaded"):
        reward(tmp_path)
    with pytest.raises(UserError, match=r"sees later tokens"):
        reward(reward_models["encoder"], value="red")
    with pytest.raises(UserError, match=r"data\.separator = ' \| ', but the reward model in .* was trained with ', '"):
        build_reward(
            RewardConfig(source="model", model=str(reward_models["decoder"])),
            tokenizer(),
            expected_length=1.0,
            separator=" | ",
        )
    (wrong,) = sampled([" tent"])
    with pytest.raises(UserError, match="not what its tokens decode to"):
        reward(reward_models["decoder"])([replace(wrong, text=" other")])


def test_a_run_on_its_rewards(
    reward_models: dict[str, Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sessions = [
        Session(user_id=f"u{i}", history={"search": ["lisbon"]}, next_queries=["hotels", "flights"]) for i in range(12)
    ]
    write_sessions(tmp_path / "s.jsonl", sessions)
    config = settings.build(
        {
            "run_dir": str(tmp_path / "run"),
            "threads": 1,
            "model": {"path": str(tiny_model)},
            "data": {"train": str(tmp_path / "s.jsonl"), "eval_fraction": 0.3},
            "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 8},
            "reward": {"source": "model", "model": str(reward_models["decoder"]), "value": "soft"},
            "train": {"steps": 2, "eval_prompts": 2, "show_examples": 1, "tensorboard": False},
        }
    )
    trainer.train(config)
    rows = read_metrics(config.run_dir)
    assert rows[-1]["rollout/reward_mean"] > 0.0
    assert 0.0 <= rows[-1]["rollout/copied_share"] <= 1.0
    record = json.loads((config.run_dir / "reward_model.json").read_text())
    assert record["labeller"] == ["planted"]
    trained_on = {user_hash(row.user_id) for row in split(planted.rows(300), LabelsConfig(labels="x"), 0).train}
    _, held_out = load_sessions(config)
    users = {session.user_id for session in held_out}
    known = sum(user_hash(user) in trained_on for user in users)
    assert known > 0
    assert f"was trained on {known} of the {len(users)} held-out users" in capsys.readouterr().err
    for stranger in (config.reward, config.reward.model_copy(update={"source": "lexical"})):
        warn_of_known_users(stranger, ["nobody"] if stranger is config.reward else list(users))
    assert not capsys.readouterr().err


# ---------------------------------------------------------------- related work, each against its formula


def test_rto() -> None:
    dpo, ref, pi = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -0.5, -0.5]), torch.tensor([-1.0, -0.7, -0.6])
    found = related.rto(dpo, ref, pi, 0.3)
    by_hand = [0.05 * 0.5 - 0.01 * 0.5, -0.05 - 0.01 * -0.2, 0.0 - 0.01 * -0.1 + 0.3]  # the second is clipped
    assert found.tolist() == pytest.approx(by_hand, abs=1e-7)


def test_red_telescopes_to_the_sentence_score() -> None:
    scores = torch.tensor([0.2, 0.5, 0.4])
    assert related.red(scores).tolist() == pytest.approx([0.2, 0.3, -0.1])
    for share in (0.0, 0.3, 1.0):
        assert float(related.red(scores, share=share).sum()) == pytest.approx(0.4)
    assert related.red(scores, share=0.5).tolist() == pytest.approx([0.1, 0.15, -0.05 + 0.2])


def test_tlcr_is_in_minus_one_to_one_and_spares_separators() -> None:
    assert related.tlcr(P).tolist() == pytest.approx([2 * 0.7 / 0.9 - 1, 0.0, -0.5, 0.0])
    assert related.tlcr(torch.eye(3)).tolist() == [0.0, -1.0, 1.0]


def test_abc_redistributes_by_attention() -> None:
    found = related.abc(torch.tensor([1.0, 3.0]), 2.0, share=0.5)
    assert found.tolist() == pytest.approx([0.25, 0.75 + 1.0])
    assert float(related.abc(torch.rand(7) + 0.1, -1.5, share=0.7).sum()) == pytest.approx(-1.5, abs=1e-6)
