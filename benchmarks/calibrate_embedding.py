"""Thresholds of the embedding judge, from planted mistakes in real sessions.

    PYTHONPATH=. python -m benchmarks.calibrate_embedding SESSIONS --model ENCODER [--sessions 400] [--held-out]

A true query of each session stands for a good response. Its words are relevant; a word of another user's queries that is put into
it, or in the place of one of its words, is not, nor are the words of another user's query. ``--held-out`` takes that query out of
the truth, so that the judge must see relevance without the words. Printed: area under the curve and the thresholds with the
best balanced accuracy, for words in both modes and for whole queries, where the history's last query with a foreign word
added is a third kind of bad response.
"""

from __future__ import annotations

import argparse
import operator
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import mannwhitneyu

from tppo_fast.data.rows import searched
from tppo_fast.data.sessions import Session, read_sessions
from tppo_fast.labelling.embedding import MODES, SentenceEncoder

Planted = tuple[Sequence[str], list[str], list[bool]]
"""(truth, the words of one response query, which of them are relevant)."""


def plant(sessions: Sequence[Session], held_out: bool, rng: random.Random) -> tuple[list[Planted], list[Planted]]:
    """Queries with known words, and queries (as one flag) with known relevance as a whole."""
    words, wholes = [], []
    for session in sessions:
        query, truth = session.next_queries[0].split(), session.next_queries[1 if held_out else 0 :]
        own = {w.lower() for text in (*session.next_queries, *searched(session.history)) for w in text.split()}
        other = rng.choice([s for s in sessions if s.user_id != session.user_id])
        foreign = [w for text in other.next_queries for w in text.split() if w.lower() not in own]
        if not foreign:
            continue
        strange, place = rng.choice(foreign), rng.randrange(len(query))
        words.append((truth, query, [True] * len(query)))
        added = [*query[:place], strange, *query[place:]]
        words.append((truth, added, [n != place for n in range(len(added))]))
        words.append((truth, [*query[:place], strange, *query[place + 1 :]], [n != place for n in range(len(query))]))
        unrelated = other.next_queries[0].split()
        words.append((truth, unrelated, [False] * len(unrelated)))
        wholes += [(truth, query, [True]), (truth, unrelated, [False])]
        wholes.append((truth, [*searched(session.history)[-1].split(), strange], [False]))
    return words, wholes


def comparisons(query: list[str], mode: str) -> Iterator[tuple[str, str]]:
    """(with, without) for every word."""
    for n in range(len(query)):
        rest = [] if mode == "prefix" else query[n + 1 :]
        yield " ".join([*query[: n + 1], *rest]), " ".join([*query[:n], *rest])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--sessions", type=int, default=400)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    usable = [s for s in read_sessions(options.data) if len(s.next_queries) > options.held_out]
    rng.shuffle(usable)
    words, wholes = plant(usable[: options.sessions], options.held_out, rng)
    texts = {t for truth, query, _ in [*words, *wholes] for t in [*truth, " ".join(query)]}
    texts |= {t for _, query, _ in words for mode in MODES for pair in comparisons(query, mode) for t in pair if t}
    vectors = SentenceEncoder(options.model)(sorted(texts))

    def similarity(truth: Sequence[str], text: str) -> float:
        return max(float(vectors[text] @ vectors[t]) for t in truth) if text else 0.0

    for mode in MODES:
        rows = [
            (similarity(truth, full), similarity(truth, full) - similarity(truth, less), label)
            for truth, query, labels in words
            for (full, less), label in zip(comparisons(query, mode), labels, strict=True)
        ]
        close, gain, label = (np.array(column) for column in zip(*rows, strict=True))
        grid = [(q, w) for q in np.arange(0.2, 0.8, 0.05) for w in np.arange(-0.1, 0.06, 0.01)]
        (q, w), best = max(
            ((pair, _balanced((close >= pair[0]) & (gain >= pair[1]), label)) for pair in grid),
            key=operator.itemgetter(1),
        )
        print(
            f"{mode}: {len(label)} words, AUC of the gain {_auc(gain, label):.3f}, of the similarity {_auc(close, label):.3f}"
        )
        print(f"  best query_threshold {q:.2f}, word_threshold {w:.2f}: balanced accuracy {best:.3f}")
        q, w = MODES[mode]
        print(f"  default {q:.2f}, {w:.2f}: {_balanced((close >= q) & (gain >= w), label):.3f}")
    score = np.array([similarity(truth, " ".join(query)) for truth, query, _ in wholes])
    label = np.array([flags[0] for _, _, flags in wholes])
    best, at = max((_balanced(score >= t, label), t) for t in np.quantile(score, np.linspace(0, 1, 201)))
    print(f"queries: {len(label)}, AUC {_auc(score, label):.3f}, best threshold {at:.2f}: balanced accuracy {best:.3f}")


def _balanced(said: np.ndarray, label: np.ndarray) -> float:
    return float((said[label].mean() + (~said[~label]).mean()) / 2)


def _auc(score: np.ndarray, label: np.ndarray) -> float:
    wins = mannwhitneyu(score[label], score[~label]).statistic
    return float(wins / (label.sum() * (~label).sum()))


if __name__ == "__main__":
    main()
