"""The embedded sessions: a known world, exact relevance, honest ceilings."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from itertools import chain, product
from pathlib import Path

import pytest

from tppo_fast.data import baselines, synthetic
from tppo_fast.data.lexicon import FACETS, SYNONYMS, TOPICS
from tppo_fast.data.relevance import relevance
from tppo_fast.data.rows import Session, to_row
from tppo_fast.data.sessions import read_sessions, split_by_user, write_sessions
from tppo_fast.data.synthetic import PERSONAS, START, asked_within, detours, generate_sessions, relevant_facets, step
from tppo_fast.errors import UserError

GOLDEN = "54f98d6b3434c666"
"""Of 300 sessions with seed 7; changes only with the world, and then CHANGELOG says so."""


@pytest.fixture(scope="module")
def sessions() -> list[Session]:
    return generate_sessions(1500, 0)


def digest(rows: list[Session]) -> str:
    return hashlib.sha256(json.dumps([to_row(row) for row in rows]).encode()).hexdigest()[:16]


def test_same_seed_same_bytes_on_every_machine(sessions: list[Session]) -> None:
    assert digest(generate_sessions(300, 7)) == GOLDEN
    assert digest(generate_sessions(300, 8)) != GOLDEN
    assert generate_sessions(1500, 0) == sessions
    assert generate_sessions(100, 0) == sessions[:100]


def test_global_random_state_is_neither_read_nor_moved() -> None:
    random.seed(1)
    before = random.getstate()
    assert digest(generate_sessions(300, 7)) == GOLDEN
    assert random.getstate() == before


def test_vocabulary_is_small_and_unambiguous() -> None:
    names = [*chain(*TOPICS.values(), *FACETS.values()), *SYNONYMS.values()]
    assert 100 <= len({word for name in names for word in name.split()}) <= 250
    assert len(names) == len(set(names))
    surfaces = Counter(
        query
        for domain in TOPICS
        for topic, facet in product(TOPICS[domain], FACETS[domain])
        for query in synthetic.forms(topic, facet)
    )
    assert max(surfaces.values()) == 1


def test_rows_are_sound(sessions: list[Session]) -> None:
    per_user = Counter(session.user_id for session in sessions)
    assert 1.5 < sum(per_user.values()) / len(per_user) < 2.5
    for session in sessions:
        history = session.history["search"]
        domain, topic, _, asked = baselines.current(session)
        assert len(session.next_queries) == len(set(session.next_queries)) == synthetic.HORIZON
        assert all(query.startswith(f"{topic} ") for query in (*session.next_queries, *session.relevant_queries))
        assert not {*session.next_queries, *session.relevant_queries} & set(history)
        facets = {baselines.walks([topic, query])[0][2][0] for query in session.next_queries}
        assert len(facets) == synthetic.HORIZON
        assert not facets & asked
        assert facets <= set(FACETS[domain])


def test_rows_survive_the_disk(sessions: list[Session], tmp_path: Path) -> None:
    write_sessions(tmp_path / "s.jsonl", sessions[:50])
    assert [to_row(row) for row in read_sessions(tmp_path / "s.jsonl")] == [to_row(row) for row in sessions[:50]]


def test_held_out_topics_are_seen_in_training(sessions: list[Session]) -> None:
    train, held_out = split_by_user(sessions, 0.1, 0)
    topics = {baselines.current(session)[1] for session in train}
    assert {baselines.current(session)[1] for session in held_out} <= topics
    assert len(topics) == sum(map(len, TOPICS.values()))


def test_steps_and_detours_are_distributions_over_new_facets() -> None:
    rng = random.Random(0)
    for persona, domain in product(range(PERSONAS), FACETS):
        state, asked = START, frozenset[str]()
        while len(asked) < len(FACETS[domain]):
            expected = step(persona, domain, state, asked)
            assert sum(expected.values()) == pytest.approx(1.0)
            assert not set(expected) & asked
            assert not {*expected, *asked} & set(detours(persona, domain, state, asked))
            assert len(expected) + len(asked) + len(detours(persona, domain, state, asked)) == len(FACETS[domain])
            state = rng.choice(list(expected))
            asked |= {state}


def test_relevance_is_the_chain_enumerated() -> None:
    """Against a simulation of the chain, and against a hand-written three-level sum."""
    rng = random.Random(0)
    persona, domain, state = 2, "goods", "price"
    asked = frozenset({"price"})
    exact = asked_within(persona, domain, state, asked, 3)
    assert sum(exact.values()) == pytest.approx(3.0)
    by_hand: Counter[str] = Counter()
    for a, p in step(persona, domain, state, asked).items():
        for b, q in step(persona, domain, a, asked | {a}).items():
            for c, r in step(persona, domain, b, asked | {a, b}).items():
                for facet in (a, b, c):
                    by_hand[facet] += p * q * r  # type: ignore[assignment]
    assert exact == pytest.approx(dict(by_hand))
    counts: Counter[str] = Counter()
    for _ in range(4000):
        walk = synthetic._Walk(persona=persona, domain=domain, topic="tent", state=state, asked=asked)
        for _ in range(3):
            walk.state = synthetic._draw(rng, step(persona, domain, walk.state, walk.asked))
            walk.asked |= {walk.state}
            counts[walk.state] += 1
    for facet, chance in exact.items():
        assert counts[facet] / 4000 == pytest.approx(chance, abs=0.04)
    assert set(relevant_facets(persona, domain, state, asked)) == {
        f for f, p in exact.items() if p >= synthetic.RELEVANT
    }


def test_relevant_queries_do_not_depend_on_what_was_asked_next(sessions: list[Session]) -> None:
    """Detours are off-persona, so a good share of the real next queries is irrelevant, and most are not."""
    share = baselines.score(lambda session: session.next_queries, sessions)
    assert 0.4 < share < 0.8


def test_the_log_holds_the_declared_share_of_detours() -> None:
    """Seen from outside: the first next query is off the chain of the true state at rate DETOUR."""
    rng = random.Random(3)
    off = total = 0
    for _ in range(4000):
        walk = synthetic._Walk(persona=1, domain="travel", topic="kyoto", state="map", asked=frozenset({"map"}))
        expected = step(1, "travel", "map", walk.asked)
        off += walk.next_facet(rng) not in expected
        total += 1
    assert off / total == pytest.approx(synthetic.DETOUR, abs=0.03)


def test_baselines_are_ordered_and_the_ceiling_is_clearly_higher(sessions: list[Session]) -> None:
    scores = {name: baselines.score(predict, sessions) for name, predict in baselines.PREDICTORS.items()}
    values = list(scores.values())
    assert values == sorted(values)
    assert scores["copy the last query"] == 0.0
    assert scores["right topic, random facets"] < 0.5
    assert scores["exact Bayes, whole history"] > scores["exact Bayes, current session only"] + 0.1
    assert scores["exact Bayes, whole history"] > 0.8


def test_the_posterior_is_calibrated(sessions: list[Session]) -> None:
    """The ceiling it promises for itself is the one it reaches: the likelihood has no missing factor."""
    promised = 0.0
    for session in sessions:
        domain, topic, _, asked = baselines.current(session)
        belief = baselines.posterior(session)
        assert sum(belief.values()) == pytest.approx(1.0)
        response = set(baselines.bayes(session))
        for (persona, state), weight in belief.items():
            facets = relevant_facets(persona, domain, state, asked)
            found = response & {form for facet in facets for form in synthetic.forms(topic, facet)}
            promised += weight * len(found) / 3 / len(sessions)
    assert promised == pytest.approx(baselines.score(baselines.bayes, sessions), abs=0.02)


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        (["kyoto map", "kyoto food", "kyoto visa"], 2 / 3),
        (["Kyoto  MAP", "kyoto map", "kyoto map "], 1 / 3),
        (["kyoto trains", "kyoto"], 0.0),
        ([], 0.0),
        (["x", "y", "z", "kyoto map"], 0.0),
    ],
)
def test_relevance_by_hand(queries: list[str], expected: float) -> None:
    relevant = ["kyoto map", "kyoto food", "kyoto trains"]
    assert relevance(queries, relevant=relevant, history=["KYOTO trains"], num_queries=3) == pytest.approx(expected)


def test_at_least_one_session() -> None:
    with pytest.raises(UserError, match="synthetic_sessions = 0"):
        generate_sessions(0, 0)
