"""What a labelling run will ask for, before it asks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tppo_fast.labelling.judges import Item
from tppo_fast.labelling.prompting import PromptTemplate
from tppo_fast.rewards.segment import segment

CHARACTERS_PER_TOKEN = 4.0
"""The declared rule where no tokenizer is given; about right for English, too low for most other languages."""
OVERHEAD = 4
"""Tokens that a chat format adds to one message, about."""

Count = Callable[[str], int]


def by_characters(text: str) -> int:
    """Tokens by the declared rule."""
    return -(-len(text) // int(CHARACTERS_PER_TOKEN))


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Requests and tokens, without retries, re-asked answers and whatever a model thinks before it answers."""

    requests: int
    """One for each distinct response with words that is not labelled yet."""
    prompt_tokens: int
    """Sent."""
    completion_tokens: int
    """Received."""

    def price(self, prompt: float, completion: float) -> float:
        """In the currency of the two prices, which are per million tokens."""
        return (self.prompt_tokens * prompt + self.completion_tokens * completion) / 1e6


def estimate(items: Sequence[Item], template: PromptTemplate, separator: str, count: Count) -> Estimate:
    """What judging ``items`` with an LLM takes."""
    requests = sent = received = 0
    for item in items:
        parts = segment(item.response, separator)
        words = len(parts.flat)
        if not words:
            continue
        requests += 1
        sent += sum(count(message["content"]) + OVERHEAD for message in template.messages(item, parts))
        received += count(_answer(template, words))
    return Estimate(requests=requests, prompt_tokens=sent, completion_tokens=received)


def _answer(template: PromptTemplate, words: int) -> str:
    labels = {"words": {str(n): 1 for n in range(1, words + 1)}} if template.answer == "words" else {}
    return json.dumps({**labels, "sentence": 1})
