"""A small world whose word relevance is known exactly: a word is relevant when it belongs to the domain of the history.

No word of a response stands in its history, so that copying tells nothing.
"""

from __future__ import annotations

import random
from pathlib import Path

from tppo_fast.labelling.records import LabelledResponse, write_labels
from tppo_fast.rewards.labels import IRRELEVANT, RELEVANT, SEPARATOR, Labels
from tppo_fast.words import word_spans

WORLD = {
    "travel": (("lisbon", "kyoto", "prague", "naples"), ("hotels", "flights", "museums", "beaches", "airport")),
    "goods": (("kettle", "tent", "camera", "guitar"), ("price", "repair", "manual", "warranty", "discount")),
    "skills": (("chess", "pottery", "yoga", "python"), ("course", "book", "exercises", "video", "mistakes")),
}


def label(domain: str, response: str) -> Labels:
    """The truth."""
    spans = [*word_spans(response), *((i, i + 1) for i, c in enumerate(response) if c == ",")]
    kinds = dict.fromkeys(WORLD[domain][1], RELEVANT)
    labelled = sorted(
        (s, SEPARATOR if response[s[0]] == "," else kinds.get(response[s[0] : s[1]], IRRELEVANT)) for s in spans
    )
    classes = [c for _, c in labelled]
    relevant = classes.count(RELEVANT)
    return Labels(
        spans=[s for s, _ in labelled], classes=classes, sentence=int(relevant * 2 >= len(word_spans(response)))
    )


def rows(count: int, seed: int = 0) -> list[LabelledResponse]:
    """``count`` responses of 3 two-word queries, 4 responses per user."""
    rng = random.Random(seed)
    words = [word for _, facets in WORLD.values() for word in facets]
    made = []
    for i in range(count):
        domain = rng.choice(list(WORLD))
        likely = WORLD[domain][1]
        queries = [f"{rng.choice(likely if rng.random() < 0.4 else words)} {rng.choice(words)}" for _ in range(3)]
        response = " " + ", ".join(queries)
        made.append(
            LabelledResponse(
                user_id=f"u{i // 4}",
                history={"search": tuple(rng.sample(WORLD[domain][0], 2))},
                next_queries=(rng.choice(likely),),
                response=response,
                labels=label(domain, response),
                labeller="planted",
            )
        )
    return made


def write(path: Path, count: int) -> Path:
    write_labels(path, rows(count))
    return path
