"""The watch for reward hacking: it warns of each kind once, and of nothing in a healthy run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support import letter_by_letter, prompt, rollout, tokenizer

from tppo_fast.metrics import GLOSSARY
from tppo_fast.rewards.watch import RunWatch, canonical_share, repetition_and_copies

HEALTHY = {
    "rollout/reward_mean": 1.0,
    "rollout/length_mean": 12.0,
    "rollout/repeated_share": 0.05,
    "rollout/copied_share": 0.1,
    "rollout/canonical_share": 0.98,
    "ppo/kl": 0.05,
    "ppo/value_mean": 4.0,
    "ppo/return_mean": 5.0,
}


def run(change: dict[str, float], looks: tuple[float, float] = (0.4, 0.45)) -> list[str]:
    """Twenty steps that move from the healthy values to changed ones, and a look at each end."""
    watch = RunWatch()
    said = watch({"eval/relevance": looks[0], "eval/word_relevance": 0.5})
    for step in range(20):
        said += watch({**HEALTHY, **(change if step >= 10 else {})})
    return said + watch({**HEALTHY, **change, "eval/relevance": looks[1], "eval/word_relevance": 0.5})


def test_a_healthy_run_is_left_in_peace() -> None:
    assert run({"rollout/reward_mean": 2.0, "rollout/length_mean": 14.0}) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rollout/length_mean": 25.0}, "grown from 12.0 to"),
        ({"rollout/repeated_share": 0.4}, "repeat an earlier one"),
        ({"rollout/copied_share": 0.4}, "stand in the history"),
        ({"rollout/canonical_share": 0.8}, "of the tokens they were sampled in, 98% at first"),
        ({"ppo/kl": 0.9}, "nats per token from the reference"),
        ({"ppo/value_mean": 0.2}, "predicts 0.2 where returns are 5: raise ppo.critic_lr"),
    ],
)
def test_each_kind_is_said_once(change: dict[str, float], said: str) -> None:
    (only,) = run(change)
    assert said in only


def test_reward_up_while_relevance_falls() -> None:
    (only,) = run({"rollout/reward_mean": 2.0}, looks=(0.4, 0.3))
    assert "it is hacked" in only
    assert "0.100" in only
    assert run({"rollout/reward_mean": 0.5}, looks=(0.4, 0.3)) == []  # the reward fell too: nothing was gamed


@pytest.mark.parametrize("stopped", [3, 11, 14])
def test_a_resumed_run_warns_as_if_it_had_never_stopped(stopped: int) -> None:
    rows = [HEALTHY] * 10 + [{**HEALTHY, "ppo/kl": 0.9, "rollout/length_mean": 40.0}] * 8
    straight, resumed = RunWatch(), RunWatch(rows[:stopped])
    for number, row in enumerate(rows):
        said = straight(row)
        if number >= stopped:
            assert resumed(row) == said
    assert straight(rows[-1]) == []


def test_a_text_in_more_tokens_than_it_needs() -> None:
    tok = tokenizer()
    short = replace(rollout(prompt([1]), [*tok(" lisbon hotels").input_ids, tok.eos_token_id]), text=" lisbon hotels")
    long = letter_by_letter(short, tok)
    assert canonical_share([short], tok) == {"rollout/canonical_share": 1.0}
    needed, sampled = (len(r.token_ids) - 1 for r in (short, long))
    share = 2 * needed / (needed + sampled)
    assert canonical_share([short, long], tok) == {"rollout/canonical_share": pytest.approx(share)}
    silent = rollout(prompt([1]), [tok.eos_token_id])
    assert canonical_share([silent], tok) == {"rollout/canonical_share": 1.0}
    assert "rollout/canonical_share" in GLOSSARY


def test_shares_of_a_step() -> None:
    where = replace(prompt([1]), history=("Lisbon", "tram map"))
    texts = [" lisbon, tram, tram, hotels", ""]
    found = repetition_and_copies([replace(rollout(where, [1]), text=t) for t in texts], ", ")
    assert found == {"rollout/repeated_share": 0.125, "rollout/copied_share": 0.125}
    assert found.keys() <= GLOSSARY.keys()
