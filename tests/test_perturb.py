"""Spoiled responses: always spoiled by known means, the same for the same generator, never empty."""

from __future__ import annotations

import random

from tppo_fast.data.perturb import perturb

HISTORY, OTHERS = ["lisbon", "lisbon hotels"], ["tent price", "chess course book"]
GOOD = ["lisbon tram map", "lisbon weather", "lisbon museums"]


def test_every_kind_of_error_occurs_and_nothing_else() -> None:
    rng = random.Random(0)
    made = [perturb(GOOD, HISTORY, OTHERS, rng) for _ in range(500)]
    words = {word for query in (*GOOD, *HISTORY, *OTHERS) for word in query.split()}
    for queries in made:
        assert len(queries) >= 3
        assert all(word in words for query in queries for word in query.split())
    assert sum(queries == GOOD for queries in made) < 50  # doubling what was dropped, say
    seen = {query for queries in made for query in queries}
    assert seen >= {*HISTORY, *OTHERS, "lisbon lisbon weather", "weather lisbon", "weather"}
    assert any(len(queries) > 5 for queries in made)
    assert any(len(set(queries)) < len(queries) for queries in made)
    assert any(query.count("lisbon") > 4 for query in seen)


def test_the_generator_decides() -> None:
    assert perturb(GOOD, HISTORY, OTHERS, random.Random(3)) == perturb(GOOD, HISTORY, OTHERS, random.Random(3))
    assert GOOD == ["lisbon tram map", "lisbon weather", "lisbon museums"]
    assert perturb(["x"], HISTORY, OTHERS, random.Random(1))
