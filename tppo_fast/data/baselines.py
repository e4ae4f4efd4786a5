"""What can be reached on the embedded sessions, without any model: the floor, and the exact ceiling.

Mean relevance of 4000 sessions, seed 0, printed by ``python -m tppo_fast.data.baselines`` (no randomness is left in it):

    copy the last query                 0.000
    right topic, random facets          0.429
    right topic, most popular facets    0.691
    exact Bayes, current session only   0.839
    exact Bayes, whole history          0.958   the ceiling: no policy can expect more
    the relevant queries themselves     1.000
    what the users asked next           0.703   the noisy log itself, which imitation aims at
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Callable, Sequence
from functools import lru_cache

from tppo_fast.data.lexicon import FACETS, SYNONYMS, TOPICS
from tppo_fast.data.relevance import relevance
from tppo_fast.data.rows import Session
from tppo_fast.data.synthetic import (
    DETOUR,
    HORIZON,
    PERSONAS,
    START,
    detours,
    forms,
    generate_sessions,
    relevant_facets,
    step,
)

Predictor = Callable[[Session], Sequence[str]]
Belief = dict[tuple[int, str], float]
"""P(persona, state of its chain), not normalised."""


def score(predict: Predictor, sessions: Sequence[Session], num_queries: int = HORIZON) -> float:
    """Mean relevance of a predictor's queries over sessions of ``generate_sessions``, in [0, 1]."""
    total = 0.0
    for session in sessions:
        history = session.history["search"]
        total += relevance(
            predict(session), relevant=session.relevant_queries, history=history, num_queries=num_queries
        )
    return total / len(sessions)


def copy_last(session: Session) -> list[str]:
    """The last query again: 0 by definition of relevance."""
    return [session.history["search"][-1]] * HORIZON


def oracle(session: Session) -> list[str]:
    """The relevant queries themselves: below 1 only where fewer than 3 exist."""
    return list(session.relevant_queries[:HORIZON])


def random_facets(session: Session) -> list[str]:
    """The right topic with facets not yet asked, at random (the same ones for the same session)."""
    domain, topic, _, asked = current(session)
    rng = random.Random(f"{session.user_id} {session.history['search']}")
    left = [facet for facet in FACETS[domain] if facet not in asked]
    order = sorted(left, key=lambda _: rng.random())
    return [forms(topic, facet)[0] for facet in order[:HORIZON]]


def popular_facets(session: Session) -> list[str]:
    """The right topic with the facets not yet asked that personas ask most, whoever the user is."""
    domain, topic, _, asked = current(session)
    order = [facet for facet in _popularity()[domain] if facet not in asked]
    return [forms(topic, facet)[0] for facet in order[:HORIZON]]


def bayes(session: Session) -> list[str]:
    """The best possible response to the visible history: exact posterior over personas, then the likeliest queries.

    Relevance adds up over slots, so the three queries most likely to be relevant maximise its expectation.
    """
    return _likeliest(session, posterior(session))


def persona_blind(session: Session) -> list[str]:
    """``bayes`` that reads the current session only: what is left without the user's earlier sessions."""
    return _likeliest(session, session_posterior(session))


def posterior(session: Session) -> Belief:
    """P(persona, current state | history), normalised: the forward algorithm through every session of the history."""
    personas = dict.fromkeys(range(PERSONAS), 1.0 / PERSONAS)
    belief: Belief = {}
    for domain, _, facets in walks(session.history["search"]):
        belief = _observe({(persona, START): weight for persona, weight in personas.items()}, domain, facets)
        personas = {p: sum(w for (q, _), w in belief.items() if q == p) for p in range(PERSONAS)}
    total = sum(belief.values())
    return {key: weight / total for key, weight in belief.items()}


def session_posterior(session: Session) -> Belief:
    """P(persona, current state | the current session), not normalised."""
    domain, _, facets, _ = current(session)
    return _observe({(persona, START): 1.0 for persona in range(PERSONAS)}, domain, facets)


def walks(history: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """(domain, topic, facets in the order first asked) of each session; strays and reformulations fall out.

    A session starts with its bare topic, a stray query never does.
    """
    facets: dict[str, list[str]] = {}
    domains: dict[str, str] = {}
    for query in history:
        domain, topic, facet = _surfaces()[query]
        if not facet:
            facets[topic], domains[topic] = [], domain
        elif topic in facets and facet not in facets[topic]:
            facets[topic].append(facet)
    return [(domains[topic], topic, asked) for topic, asked in facets.items()]


def current(session: Session) -> tuple[str, str, list[str], frozenset[str]]:
    """Domain, topic, facets in order, and the same as a set, of the session that the user is in."""
    domain, topic, facets = walks(session.history["search"])[-1]
    return domain, topic, facets, frozenset(facets)


def _observe(belief: Belief, domain: str, facets: Sequence[str]) -> Belief:
    """The belief after the facets of one session: each was a step of the chain, or a detour that did not move it."""
    asked: frozenset[str] = frozenset()
    for facet in facets:
        after: Belief = {}
        for (persona, state), weight in belief.items():
            others = detours(persona, domain, state, asked)
            chance = step(persona, domain, state, asked).get(facet, 0.0) * (1.0 - DETOUR if others else 1.0)
            for key, likelihood in (((persona, facet), chance), ((persona, state), _detour_chance(facet, others))):
                if likelihood:
                    after[key] = after.get(key, 0.0) + weight * likelihood
        belief, asked = after, asked | {facet}
    return belief


def _detour_chance(facet: str, others: Sequence[str]) -> float:
    return DETOUR / len(others) if facet in others else 0.0


def _likeliest(session: Session, belief: Belief) -> list[str]:
    domain, topic, _, asked = current(session)
    chance: dict[str, float] = dict.fromkeys(FACETS[domain], 0.0)
    for (persona, state), weight in belief.items():
        for facet in relevant_facets(persona, domain, state, asked):
            chance[facet] += weight
    order = sorted(chance, key=lambda facet: -chance[facet])
    return [form for facet in order for form in forms(topic, facet)][:HORIZON]


@lru_cache(maxsize=1)
def _popularity() -> dict[str, list[str]]:
    """Domain -> facets, those first that are most often relevant, counted over every persona and first facet."""
    counts = {domain: dict.fromkeys(facets, 0) for domain, facets in FACETS.items()}
    for domain, facets in FACETS.items():
        for persona, state in itertools.product(range(PERSONAS), facets):
            for facet in relevant_facets(persona, domain, state, frozenset({state})):
                counts[domain][facet] += 1
    return {domain: sorted(count, key=lambda facet: -count[facet]) for domain, count in counts.items()}


@lru_cache(maxsize=1)
def _surfaces() -> dict[str, tuple[str, str, str]]:
    """Every query the world can produce -> domain, topic, facet ("" for the bare topic)."""
    found: dict[str, tuple[str, str, str]] = {}
    for domain, topics in TOPICS.items():
        for topic in topics:
            found[topic] = (domain, topic, "")
            for facet in FACETS[domain]:
                names = [facet, SYNONYMS[facet]] if facet in SYNONYMS else [facet]
                found |= {query: (domain, topic, facet) for n in names for query in (f"{topic} {n}", f"{n} {topic}")}
    return found


PREDICTORS: dict[str, Predictor] = {
    "copy the last query": copy_last,
    "right topic, random facets": random_facets,
    "right topic, most popular facets": popular_facets,
    "exact Bayes, current session only": persona_blind,
    "exact Bayes, whole history": bayes,
    "the relevant queries themselves": oracle,
}


def main() -> None:
    """Print the table of this module's docstring."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sessions = generate_sessions(options.count, options.seed)
    for name, predict in PREDICTORS.items():
        print(f"{name:36}{score(predict, sessions):.3f}")
    print(f"{'what the users asked next':36}{score(lambda session: session.next_queries, sessions):.3f}")


if __name__ == "__main__":
    main()
