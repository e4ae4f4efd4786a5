"""Search sessions from a known world, so that relevance has a ground truth that can be computed exactly.

The world is fixed (``seed`` only chooses users and what they do): 3 domains x 16 topics x 10 facets, 4 personas. A
persona is, per domain, a Markov chain over facets: a session starts with any facet, and after each one three facets may
follow, with probabilities ``STEP``, never one already asked in the session. Some facets are popular with everybody. A
user has one persona and several sessions on different topics. A session asks for its topic, then for ``topic facet``
(specialisation), where

- a facet with a synonym is sometimes asked by it, and a query is sometimes repeated in other words or word order
  (reformulation, in the history only);
- sometimes a query on another topic slips in (in the history only);
- with probability ``DETOUR`` a step is a facet the persona would not ask next: logs are noisy, so that perfect
  imitation is not the best policy. A detour does not move the chain.

What the policy must do: read the topic off the current session and the persona off the whole history.

``next_queries`` are the session's next 3 steps. ``relevant_queries`` do not depend on them: they are every form of
every facet that the persona, from the current facet and without detours, asks within the next 3 steps with a
probability of at least ``RELEVANT``, by enumeration of the chain. What can be reached: ``tppo_fast.data.baselines``.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from tppo_fast.data.lexicon import FACETS, SYNONYMS, TOPICS
from tppo_fast.data.rows import Session
from tppo_fast.errors import UserError

T = TypeVar("T")

PERSONAS = 4
FOLLOWERS = 6
"""Facets that may follow each facet at all; every persona chooses three of them, in an order of its own."""
HORIZON = 3
"""Steps that ``next_queries`` and ``relevant_queries`` look ahead."""
STEP = (0.7, 0.2, 0.1)
"""Probability of a persona's first, second and third choice of the next facet."""
DETOUR = 0.2
"""Share of steps that the persona would not take."""
RELEVANT = 0.35
"""Least probability of being asked within ``HORIZON`` steps that makes a facet relevant."""
POPULARITY = 1.5
"""How much more often the lexicon's first facets follow others: the exponent of a Zipf law."""
SYNONYM, REFORMULATION, OTHER_TOPIC = 0.2, 0.15, 0.2
EARLIER_SESSIONS = 1
START = ""
"""The chain's state before the first facet of a session."""


def generate_sessions(count: int, seed: int) -> list[Session]:
    """``count`` sessions of about ``count / 2`` users, one after the other.

    The same seed gives the same sessions on every machine and Python version. User ids do not depend on the seed: to
    hold out users, split one seed's sessions with ``split_by_user``.

    Raises:
        UserError: count below 1.
    """
    if count < 1:
        raise UserError(f"data.synthetic_sessions = {count}: ask for at least 1 session")
    rng = random.Random(f"tppo-fast sessions {seed}")
    sessions: list[Session] = []
    user = 0
    while len(sessions) < count:
        sessions += _user_sessions(f"user-{user:06d}", rng)
        user += 1
    return sessions[:count]


@lru_cache(maxsize=1)
def chains() -> tuple[Mapping[str, Mapping[str, tuple[str, ...]]], ...]:
    """Persona -> domain -> facet -> its three next facets, likeliest first."""
    rng = random.Random("tppo-fast world")
    common = {
        domain: {facet: _followers(rng, [f for f in facets if f != facet]) for facet in facets}
        for domain, facets in FACETS.items()
    }
    return tuple(
        {
            domain: {facet: tuple(_sample(rng, followers, len(STEP))) for facet, followers in facets.items()}
            for domain, facets in common.items()
        }
        for _ in range(PERSONAS)
    )


def _followers(rng: random.Random, facets: Sequence[str]) -> list[str]:
    """``FOLLOWERS`` distinct facets; those early in the lexicon are popular and follow many others."""
    weights = {facet: (rank + 1.0) ** -POPULARITY for rank, facet in enumerate(facets)}
    chosen: list[str] = []
    for _ in range(FOLLOWERS):
        chosen.append(_draw(rng, weights))
        del weights[chosen[-1]]
    return chosen


@lru_cache(maxsize=100_000)
def step(persona: int, domain: str, state: str, asked: frozenset[str]) -> Mapping[str, float]:
    """P(next facet) without detours; facets already asked are left out and the rest scaled up.

    At ``START``, and where all three choices were asked, every facet not yet asked is equally likely.
    """
    choices = zip(chains()[persona][domain][state], STEP, strict=True) if state != START else ()
    weights = {facet: weight for facet, weight in choices if facet not in asked}
    weights = weights or {facet: 1.0 for facet in FACETS[domain] if facet not in asked}
    total = sum(weights.values())
    return {facet: weight / total for facet, weight in weights.items()}


@lru_cache(maxsize=100_000)
def detours(persona: int, domain: str, state: str, asked: frozenset[str]) -> tuple[str, ...]:
    """The facets a detour may take: not yet asked and not a possible next step."""
    expected = step(persona, domain, state, asked)
    return tuple(facet for facet in FACETS[domain] if facet not in asked and facet not in expected)


@lru_cache(maxsize=100_000)
def asked_within(persona: int, domain: str, state: str, asked: frozenset[str], horizon: int) -> Mapping[str, float]:
    """P(facet is asked within the next ``horizon`` steps), by enumeration of every path of the chain."""
    total: dict[str, float] = {}
    if horizon == 0:
        return total
    for facet, weight in step(persona, domain, state, asked).items():
        total[facet] = total.get(facet, 0.0) + weight
        for later, chance in asked_within(persona, domain, facet, asked | {facet}, horizon - 1).items():
            total[later] = total.get(later, 0.0) + weight * chance
    return total


def relevant_facets(persona: int, domain: str, state: str, asked: frozenset[str]) -> tuple[str, ...]:
    """The facets relevant now, likeliest first."""
    chances = asked_within(persona, domain, state, asked, HORIZON)
    kept = [facet for facet, chance in chances.items() if chance >= RELEVANT]
    return tuple(sorted(kept, key=lambda facet: (-chances[facet], facet)))


def forms(topic: str, facet: str) -> tuple[str, ...]:
    """Every way to ask for a facet of a topic: by its name and by its synonym, if it has one."""
    return tuple(f"{topic} {name}" for name in (facet, SYNONYMS.get(facet)) if name)


@dataclass(slots=True, kw_only=True)
class _Walk:
    """One session in the making: a persona's way through the facets of one topic."""

    persona: int
    domain: str
    topic: str
    state: str = START
    asked: frozenset[str] = frozenset()

    def next_facet(self, rng: random.Random) -> str:
        expected = step(self.persona, self.domain, self.state, self.asked)
        others = detours(self.persona, self.domain, self.state, self.asked)
        if others and rng.random() < DETOUR:
            facet = _pick(rng, others)
        else:
            facet = self.state = _draw(rng, expected)
        self.asked |= {facet}
        return facet

    def relevant(self) -> tuple[str, ...]:
        facets = relevant_facets(self.persona, self.domain, self.state, self.asked)
        return tuple(form for facet in facets for form in forms(self.topic, facet))


def _user_sessions(user_id: str, rng: random.Random) -> list[Session]:
    """All rows of one user: each session's history starts with the user's last ``EARLIER_SESSIONS`` sessions."""
    persona = int(rng.random() * PERSONAS)
    rows = EARLIER_SESSIONS + 1 + int(rng.random() * 3)
    topics = _sample(rng, [(domain, topic) for domain, names in TOPICS.items() for topic in names], rows)
    searched: list[list[str]] = []
    sessions: list[Session] = []
    for domain, topic in topics:
        walk = _Walk(persona=persona, domain=domain, topic=topic)
        visible = _visible(walk, rng, topics)
        relevant = walk.relevant()
        following = [_asked_as(walk, rng) for _ in range(HORIZON)]
        if len(searched) >= EARLIER_SESSIONS:
            earlier = [query for queries in searched[-EARLIER_SESSIONS:] for query in queries]
            history = {"search": (*earlier, *visible)}
            row = Session(user_id=user_id, history=history, next_queries=following, relevant_queries=relevant)
            sessions.append(row)
        searched.append([*visible, *following])
    return sessions


def _visible(walk: _Walk, rng: random.Random, topics: Sequence[tuple[str, str]]) -> list[str]:
    """A session up to now: the topic, one or two facets, reformulations and a stray query now and then."""
    queries = [walk.topic]
    for _ in range(1 + int(rng.random() * 2)):
        query = _asked_as(walk, rng)
        queries.append(query)
        if rng.random() < REFORMULATION:
            queries.append(_reformulated(walk.topic, query, rng))
    if rng.random() < OTHER_TOPIC:
        queries.insert(1 + int(rng.random() * len(queries)), _stray(rng, topics))
    return queries


def _asked_as(walk: _Walk, rng: random.Random) -> str:
    name, *synonyms = forms(walk.topic, walk.next_facet(rng))
    return synonyms[0] if synonyms and rng.random() < SYNONYM else name


def _reformulated(topic: str, query: str, rng: random.Random) -> str:
    """The same query by its other name, or with the facet first."""
    facet = query.removeprefix(f"{topic} ")
    others = [other for name, synonym in SYNONYMS.items() for other in (name, synonym) if facet in (name, synonym)]
    others = [f"{topic} {other}" for other in others if other != facet]
    return others[0] if others and rng.random() < 0.5 else f"{facet} {topic}"


def _stray(rng: random.Random, topics: Sequence[tuple[str, str]]) -> str:
    """A query on a topic that is none of the user's, so that it tells nothing of the persona."""
    mine = {topic for _, topic in topics}
    domain, topic = _pick(rng, [(d, t) for d, names in TOPICS.items() for t in names if t not in mine])
    return f"{topic} {_pick(rng, FACETS[domain])}"


def _pick(rng: random.Random, items: Sequence[T]) -> T:
    # Everything is drawn with random(): of the random module, only it is promised never to change.
    return items[int(rng.random() * len(items))]


def _sample(rng: random.Random, items: Sequence[T], count: int) -> list[T]:
    left = list(items)
    return [left.pop(int(rng.random() * len(left))) for _ in range(count)]


def _draw(rng: random.Random, weights: Mapping[T, float]) -> T:
    point = rng.random() * sum(weights.values())
    for item, weight in weights.items():
        point -= weight
        if point < 0.0:
            return item
    return next(reversed(list(weights)))  # rounding left the point at the very end
