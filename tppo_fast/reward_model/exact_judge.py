"""What a judge that knows the generated world says of every token: the ceiling of a reward model on planted labels.

A planted label follows from the history, the response and the session's relevant queries. The first two are what a reward
model reads; the third is known up to the user's persona and place in its chain, whose exact posterior is
``baselines.posterior``. ``exact`` averages the labels over it, so that no model can read more out of the same input. The other
judges know less: one reads the current session only, one the topic alone, and ``causal`` never looks past the word it judges.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from tppo_fast.data import baselines
from tppo_fast.data.lexicon import FACETS
from tppo_fast.data.rows import searched
from tppo_fast.data.sessions import Session
from tppo_fast.data.synthetic import PERSONAS, forms, relevant_facets
from tppo_fast.labelling.records import LabelledResponse
from tppo_fast.reward_model.data import Example
from tppo_fast.rewards.alignment import project
from tppo_fast.rewards.labels import IRRELEVANT, RELEVANT, Labels
from tppo_fast.rewards.lexical import LexicalLabeller
from tppo_fast.rewards.segment import repetitions, segment

if TYPE_CHECKING:
    from jaxtyping import Float

Judge = Callable[[Example], "Float[np.ndarray, ' K']"]
"""P(relevant) of each response token."""
PLACES = 4
"""Queries of a response that ``causal`` tells apart; later ones count as the last of these."""


def judges(labeller: LexicalLabeller, training: Iterable[LabelledResponse]) -> Mapping[str, Judge]:
    """Name -> judge, the best first. ``training`` tells the causal one how often a query is new."""
    rates = _new_at_place(training, labeller.separator)
    return {
        "exact Bayes": lambda example: exact(example, labeller, baselines.posterior),
        "exact Bayes, current session only": lambda example: exact(example, labeller, baselines.session_posterior),
        "right topic, any persona and state": lambda example: exact(example, labeller, _anyone),
        "exact Bayes, no word ahead": lambda example: causal(example, labeller, rates),
    }


def exact(
    example: Example, labeller: LexicalLabeller, belief: Callable[[Session], baselines.Belief]
) -> Float[np.ndarray, " K"]:
    """P(a token's label is relevant | history, response): the labels themselves, averaged over ``belief``."""
    row, total = example.row, np.zeros(len(example.labels))
    for weight, relevant in _relevant_sets(row, belief):
        labels = labeller(searched(row.history), relevant, row.response)
        total += weight * (np.array(project(labels, example.encoded.spans)) == RELEVANT)
    return total


def causal(example: Example, labeller: LexicalLabeller, rates: Float[np.ndarray, " places"]) -> Float[np.ndarray, " K"]:
    """P(relevant | history, response up to the token's word), by what such a judge can know and no more.

    Whether a query repeats an earlier one shows at its last word. The words before it are judged as those of a new query, times
    the share of queries at that place that are new. That a word is the last is taken as known, which flatters this judge.
    """
    row, spans = example.row, example.encoded.spans
    parts = segment(row.response, labeller.separator)
    last = {words[-1] for words in parts.words if words}
    words = [word for spans in parts.words for word in spans]
    closing = Labels(spans=words, classes=[RELEVANT if w in last else IRRELEVANT for w in words], sentence=0)
    closes = np.array(project(closing, spans)) == RELEVANT
    place = np.searchsorted([start for start, _ in parts.separators], [start for start, _ in spans], side="right")
    total = np.zeros(len(spans))
    for weight, relevant in _relevant_sets(row, baselines.posterior):
        history = searched(row.history)
        final = np.array(project(labeller(history, relevant, row.response), spans)) == RELEVANT
        unfinished = np.zeros(len(spans), dtype=bool)
        for number, (_, end) in enumerate(parts.queries):
            open_end = labeller(history, relevant, row.response[:end] + " and more")
            unfinished |= (np.array(project(open_end, spans)) == RELEVANT) & (place == number)
        total += weight * np.where(closes, final, unfinished * rates[np.minimum(place, PLACES - 1)])
    return total


def _relevant_sets(
    row: LabelledResponse, belief: Callable[[Session], baselines.Belief]
) -> list[tuple[float, list[str]]]:
    """(probability, relevant queries) for every set of them that the history allows."""
    session = Session(user_id=row.user_id, history=row.history, next_queries=row.next_queries)
    domain, topic, _, asked = baselines.current(session)
    weights: Counter[tuple[str, ...]] = Counter()
    for (persona, state), weight in belief(session).items():
        weights[relevant_facets(persona, domain, state, asked)] += weight  # type: ignore[assignment]
    total = sum(weights.values())
    return [(w / total, [form for facet in facets for form in forms(topic, facet)]) for facets, w in weights.items()]


def _anyone(session: Session) -> baselines.Belief:
    """Every persona in every state."""
    domain = baselines.current(session)[0]
    return dict.fromkeys(product(range(PERSONAS), FACETS[domain]), 1.0)


def _new_at_place(rows: Iterable[LabelledResponse], separator: str) -> Float[np.ndarray, " places"]:
    """The share of new queries among those at each place of a response."""
    counts = np.zeros((PLACES, 2))
    for row in rows:
        again = repetitions(searched(row.history), segment(row.response, separator).texts)
        for place, repeated in enumerate(again):
            counts[min(place, PLACES - 1)] += (1.0, not repeated)
    return counts[:, 1] / np.maximum(counts[:, 0], 1.0)


def as_probabilities(relevant: Sequence[Float[np.ndarray, " K"]]) -> Float[np.ndarray, "K 3"]:
    """Class probabilities of all tokens from P(relevant) of each response's."""
    p = np.concatenate(relevant)
    return np.stack([np.zeros_like(p), 1.0 - p, p], axis=1)
