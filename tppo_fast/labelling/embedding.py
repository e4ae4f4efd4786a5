"""The embedding judge: a small sentence encoder on this machine, and what each word adds to a query's similarity.

A query's similarity is the largest cosine between it and a true next query. A word is relevant when the query is close enough
to the truth (``query_threshold``) and taking the word away does not bring it closer: similarity with the word minus without it
is at least ``word_threshold``; what stands between words ("wi-fi", "3.5") is encoded as written, like the truth. Queries that
repeat the history or an earlier query, and those after ``num_queries``, are irrelevant word by word: similarity alone pays for
copying. The sentence is relevant when the mean similarity of its queries, such ones counted as 0, reaches
``sentence_threshold``.

``mode="leave-one-out"`` compares the whole query with and without the word, so a later word can change an earlier label: not
causal. ``mode="prefix"`` compares what stands up to the word with what stood before it, and asks the prefix to be close to the
truth: causal, like the lexical labeller.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tppo_fast.data.rows import show
from tppo_fast.errors import UserError
from tppo_fast.labelling.judges import Item, Rejected
from tppo_fast.loading import STRICT, check_vocabulary, complete, in_short
from tppo_fast.rewards.labels import IRRELEVANT, RELEVANT, Labels
from tppo_fast.rewards.segment import Segments, admitted, check_separator, segment

MODES = {"leave-one-out": (0.45, -0.01), "prefix": (0.3, -0.01)}
"""Mode -> default (query_threshold, word_threshold), from ``benchmarks/calibrate_embedding.py`` (dev/LOG.md, 2026-11-24)."""


class SentenceEncoder:
    """Mean-pooled, normalised sentence vectors of a transformers encoder in a folder; plain transformers, no remote code.

    ``setting`` is the option that the folder came from.

    Raises:
        UserError: the folder holds no such model.
    """

    def __init__(
        self, folder: str | Path, *, setting: str = "--model", batch_size: int = 64, max_tokens: int = 128
    ) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise UserError(f"{setting} {show(str(folder))}: give a folder with a transformers encoder (config.json)")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            loaded = AutoModel.from_pretrained(folder, local_files_only=True, **STRICT)
            model = complete(loaded, is_new=lambda name: "pooler" in name.split("."))  # vectors are means of tokens
        except Exception as error:  # transformers raises many kinds for a bad folder
            raise UserError(f"{setting} {show(str(folder))} cannot be loaded: {in_short(error)}") from None
        check_vocabulary(f"{setting} {show(str(folder))}", self._tokenizer, model.get_input_embeddings().num_embeddings)
        self._model = model.eval().requires_grad_(False)
        self._batch_size, self._max_tokens = batch_size, max_tokens

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Text -> its unit vector [D], fp32, for every distinct text."""
        distinct = sorted(set(texts), key=lambda text: (len(text), text))  # similar lengths pad little
        vectors: dict[str, np.ndarray] = {}
        for start in range(0, len(distinct), self._batch_size):
            batch = distinct[start : start + self._batch_size]
            encoded = self._tokenizer(
                batch,
                padding=True,
                truncation=True,
                max_length=self._max_tokens,
                return_tensors="pt",
                split_special_tokens=True,  # a response that spells one must not end its own text
            )
            hidden = self._model(**encoded).last_hidden_state  # [B, L, D]
            mask = encoded["attention_mask"].unsqueeze(-1)
            pooled = (hidden * mask).sum(1) / mask.sum(1)
            rows = torch.nn.functional.normalize(pooled, dim=-1).numpy()
            vectors.update(zip(batch, rows, strict=True))
        return vectors

    def fingerprint(self) -> str:
        """SHA-256 over the weights, in their order."""
        total = hashlib.sha256()
        for name, tensor in self._model.state_dict().items():
            total.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return total.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingSettings:
    """Mode and thresholds."""

    mode: str = "leave-one-out"
    """"leave-one-out", or "prefix" (causal)."""
    query_threshold: float | None = None
    """Least similarity of a query (of a prefix, in that mode) whose words can be relevant. None: the mode's default."""
    word_threshold: float | None = None
    """Least similarity that a word must add. None: the mode's default."""
    sentence_threshold: float = 0.5
    """Least mean similarity of a relevant response."""
    separator: str = ", "
    """Text between queries."""
    num_queries: int | None = None
    """Queries a response should hold; words of later ones are irrelevant. None sets no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Query:
    """One generated query and the texts its judgement needs."""

    text: str
    with_word: list[str]
    without: list[str]
    novel: bool


def _tidy(text: str) -> str:
    return " ".join(text.split())


class EmbeddingJudge:
    """A ``Judge`` and a ``Labeller``."""

    chunk = 32

    def __init__(self, encoder: SentenceEncoder, settings: EmbeddingSettings) -> None:
        check_separator(settings.separator)
        if settings.mode not in MODES:
            raise UserError(f"--mode {settings.mode!r}: use {' or '.join(MODES)}")
        defaults = zip(("query_threshold", "word_threshold"), MODES[settings.mode], strict=True)
        settings = replace(settings, **{n: default for n, default in defaults if getattr(settings, n) is None})
        self._encode, self.settings = encoder, settings
        self.identity: Mapping[str, Any] = {
            "labeller": "embedding",
            "rules": 3,
            "model": encoder.fingerprint(),
            **{name: getattr(settings, name) for name in EmbeddingSettings.__slots__},
            "causal": settings.mode == "prefix",
        }

    def __call__(self, history: Sequence[str], next_queries: Sequence[str], response_text: str, /) -> Labels:
        item = Item(history=tuple(history), next_queries=tuple(next_queries), response=response_text)
        return self.label([item])[0]

    def judge(self, items: Sequence[Item]) -> list[Labels | Rejected]:
        return [*self.label(items)]

    def close(self) -> None:
        """There is nothing to give back."""

    def label(self, items: Sequence[Item]) -> list[Labels]:
        """The labels of each item, all texts encoded together."""
        parts = [segment(item.response, self.settings.separator) for item in items]
        queries = [self._queries(item, cut) for item, cut in zip(items, parts, strict=True)]
        texts = {text for item in items for text in item.next_queries}
        texts |= {t for found in queries for q in found for t in (q.text, *q.with_word, *q.without) if t}
        vectors = self._encode(sorted(texts))
        return [self._labels(*row, vectors) for row in zip(items, parts, queries, strict=True)]

    def _queries(self, item: Item, parts: Segments) -> list[_Query]:
        found = []
        novelty = admitted(item.history, parts.texts, self.settings.num_queries)
        for (begin, close), query, spans, novel in zip(parts.queries, parts.texts, parts.words, novelty, strict=True):
            text = _tidy(query) if spans else ""
            prefixes = ["", *(_tidy(parts.text[begin:end]) for _, end in spans)]
            if self.settings.mode == "prefix":
                with_word, without = prefixes[1:], prefixes[:-1]
            else:
                with_word = [text] * len(spans)
                cut = [_tidy(parts.text[begin:start] + parts.text[end:close]) for start, end in spans]
                without = cut if len(spans) > 1 else [""] * len(spans)
            found.append(_Query(text=text, with_word=with_word, without=without, novel=novel))
        return found

    def _labels(
        self, item: Item, parts: Segments, queries: Sequence[_Query], vectors: Mapping[str, np.ndarray]
    ) -> Labels:
        truth = np.stack([vectors[text] for text in item.next_queries])  # [T, D]

        def similarity(text: str) -> float:
            return float((truth @ vectors[text]).max()) if text else 0.0

        own = self.settings
        assert own.query_threshold is not None  # filled in at the start
        assert own.word_threshold is not None
        classes, means = [], []
        for query in queries:
            kinds = []
            for full, less in zip(query.with_word, query.without, strict=True):
                close = similarity(full)
                good = close >= own.query_threshold and close - similarity(less) >= own.word_threshold
                kinds.append(RELEVANT if query.novel and good else IRRELEVANT)
            classes.append(kinds)
            if query.text:
                means.append(similarity(query.text) if query.novel else 0.0)
        mean = sum(means) / len(means) if means else 0.0
        return parts.labels(classes, int(bool(means) and mean >= own.sentence_threshold))
