"""Responses that are wrong on purpose: a reward model that only ever saw its policy's own answers knows few kinds of error."""

from __future__ import annotations

import random
from collections.abc import Sequence


def perturb(queries: Sequence[str], history: Sequence[str], others: Sequence[str], rng: random.Random) -> list[str]:
    """The queries of a response with one to three errors in random places.

    An error replaces a query by one of the history, by another session's, by an earlier one of the same response or by the
    start of its own words with the end of another session's query; drops, doubles or swaps words in it; says one of its words
    several times; or appends up to five queries that stand in the response, the history or another session.

    Args:
        queries: the response's queries, at least one.
        history: the user's earlier queries, at least one.
        others: queries of other sessions, at least one.
        rng: draws everything.
    """
    changed = list(queries)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(changed))
        words = changed[place].split() or [""]
        kind = rng.choice(("history", "other", "repeat", "graft", "drop", "double", "swap", "stutter", "append"))
        if kind == "history":
            changed[place] = rng.choice(history)
        elif kind == "other":
            changed[place] = rng.choice(others)
        elif kind == "repeat":
            changed[place] = changed[rng.randrange(place + 1)]
        elif kind == "graft":
            end = rng.choice(others).split()
            changed[place] = " ".join([*words[: max(1, len(words) // 2)], *end[len(end) // 2 :]])
        elif kind == "stutter":
            at = rng.randrange(len(words))
            words[at:at] = [words[at]] * rng.randint(1, 8)
            changed[place] = " ".join(words)
        elif kind == "append":
            changed += [rng.choice(rng.choice((changed, history, others))) for _ in range(rng.randint(1, 5))]
        elif kind == "swap":
            rng.shuffle(words)
            changed[place] = " ".join(words)
        else:
            at = rng.randrange(len(words))
            words[at : at + 1] = [] if kind == "drop" and len(words) > 1 else [words[at]] * 2
            changed[place] = " ".join(words)
    return changed
