"""Sessions -> token ids: the prompt template, truncation that keeps the newest history, supervised responses."""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tppo_fast.config import DataConfig
from tppo_fast.data import prompt_file
from tppo_fast.data.rows import Session, searched, show
from tppo_fast.data_types import Prompt
from tppo_fast.errors import UserError
from tppo_fast.words import queries_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

History = dict[str, list[str]]


class PromptBuilder:
    """Renders and tokenises sessions for one policy.

    Prompt and response are encoded separately and their ids concatenated: in sampling the policy continues the
    prompt's own ids, and tokens merged across the border (" paris" after a colon) would be ids that it never sees there.
    The template is plain text: a chat template is used only by who writes its markers into ``data.template``. Of the
    special tokens that the tokenizer adds by itself, those before the text (bos) are kept and those after it are
    dropped, since an end token there would end the prompt.

    Texts are cleaned before use, in prompt, response and ``Prompt`` fields alike: whitespace becomes single spaces, and
    the separator's core (``,``) and the tokenizer's special tokens become a space, so that one query stays one query
    when a response is parsed and no text of a log can end a sequence.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, limit: str | None = None) -> None:
        """
        Args:
            tokenizer: the policy's tokenizer.
            config: template, separator, response_prefix, num_queries and max_prompt_tokens.
            limit: where max_prompt_tokens comes from, for the message. None: from the setting.

        Raises:
            UserError: the tokenizer has no end-of-sequence token.
        """
        eos = tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise UserError(
                f"model.path = {tokenizer.name_or_path!r}: its tokenizer has eos_token = {tokenizer.eos_token!r}, so that no "
                "response could end; set eos_token in its tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.config = config
        self._limit = limit or f"data.max_prompt_tokens = {config.max_prompt_tokens}"
        self.eos_token_id = eos
        self.core = config.separator.strip()
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        self._removed = sorted({self.core, *special} - {""}, key=lambda text: (-len(text), text))
        self._start = self._ids_before_text()

    def prompts(self, sessions: Sequence[Session]) -> list[Prompt]:
        """One prompt per session, tokenised as one batch.

        A history that does not fit in ``max_prompt_tokens`` loses its oldest entries, one at a time from the kind with
        most entries left (in a tie, ``search`` gives last); the template is never cut. ``Prompt.history`` still holds
        every search entry (every entry, where nothing was searched), oldest first, so that repetitions are recognised. Its
        texts are tuples: prompts last a whole run, and no plug-in can change them for the next step.

        Raises:
            UserError: even the newest entry alone is too long, or a session holds no usable text.
        """
        histories = [self._history(session) for session in sessions]
        encoded = self._encode([self._render(history) for history in histories])
        prompts = []
        for session, history, ids in zip(sessions, histories, encoded, strict=True):
            fits = len(ids) + len(self._start) <= self.config.max_prompt_tokens
            next_queries = self._cleaned(session.next_queries, session, "next_queries") if session.next_queries else []
            prompts.append(
                Prompt(
                    token_ids=[*self._start, *(ids if fits else self._truncated(history, session))],
                    user_id=session.user_id,
                    history=tuple(searched(history)),
                    next_queries=tuple(next_queries),
                    relevant_queries=tuple(
                        self._cleaned(session.relevant_queries, session, "relevant_queries") if next_queries else []
                    ),
                )
            )
        return prompts

    def responses(self, sessions: Sequence[Session]) -> list[list[int]]:
        """``response_prefix`` + the first ``num_queries`` of next_queries joined by ``separator``, then eos, as ids.

        Raises:
            UserError: a session whose next queries hold nothing but separators and special tokens.
        """
        cleaned = [self._cleaned(session.next_queries, session, "next_queries") for session in sessions]
        joined = [self.config.separator.join(queries[: self.config.num_queries]) for queries in cleaned]
        encoded = self._encode([self.config.response_prefix + text for text in joined])
        return [[*ids, self.eos_token_id] for ids in encoded]

    def save_pretrained(self, folder: Path) -> None:
        """The tokenizer, and beside it ``prompt.json``: what a policy's folder says of its prompts."""
        self.tokenizer.save_pretrained(folder)
        prompt_file.write(folder, self.config)

    def parse(self, text: str) -> list[str]:
        """The queries of a decoded response."""
        return queries_of(text, self.config.separator)

    def expected_length(self, sessions: Sequence[Session]) -> float:
        """sl of the length penalty (TPPO, section 3.3), in tokens, the separators included and eos not.

        ``sl = n * median(tokens of one query) + (n - 1) * tokens of one separator`` with n = ``num_queries``; the
        median is over the first n next queries of every session, each encoded with ``response_prefix``, and the
        separator is encoded without its trailing spaces, which belong to the query after it.

        Raises:
            UserError: no sessions.
        """
        count = self.config.num_queries
        queries = [
            self.config.response_prefix + query
            for session in sessions
            for query in self._cleaned(session.next_queries, session, "next_queries")[:count]
        ]
        if not queries:
            raise UserError("reward.expected_length = none needs training sessions to measure it on: give a number")
        *encoded, separator = self._encode([*queries, self.config.separator.rstrip()])
        return count * statistics.median(map(len, encoded)) + (count - 1) * len(separator)

    def _history(self, session: Session) -> History:
        """Kind -> cleaned entries, kinds without usable text left out, never empty."""
        history: History = {}
        for kind, entries in session.history.items():
            if cleaned := self._clean_all(entries):
                history.setdefault(self._clean(kind) or "other", []).extend(cleaned)
        if not history:
            raise UserError(f"user {show(session.user_id)}: history has no usable text: remove the session")
        return history

    def _render(self, history: History) -> str:
        """The template with the history in it: only the searches, joined by separator, or one ``kind: ...`` line each.

        Joined by hand, not by str.format: queries may hold braces.
        """
        head, _, tail = self.config.template.partition("{history}")
        lines = {kind: self.config.separator.join(entries) for kind, entries in history.items()}
        only_search = set(lines) == {"search"}
        return head + (lines["search"] if only_search else "\n".join(f"{k}: {v}" for k, v in lines.items())) + tail

    def _truncated(self, history: History, session: Session) -> list[int]:
        """Ids of the prompt with as few of the oldest entries dropped as make it fit."""
        limit = self.config.max_prompt_tokens - len(self._start)

        def encoded(left: dict[str, int]) -> list[int]:
            return self._encode([self._render({kind: history[kind][-n:] for kind, n in left.items() if n})])[0]

        candidates = list(_drops(history))  # dropping an entry makes the prompt shorter
        first = bisect.bisect_left(
            candidates, True, hi=len(candidates) - 1, key=lambda left: len(encoded(left)) <= limit
        )
        ids = encoded(candidates[first])
        if len(ids) > limit:
            raise UserError(
                f"user {show(session.user_id)}: the prompt with only the newest history entry has "
                f"{len(ids) + len(self._start)} tokens, {self._limit}: raise the limit or shorten the entry"
            )
        return ids

    def _cleaned(self, queries: Sequence[str], session: Session, field: str) -> list[str]:
        cleaned = self._clean_all(queries)
        if not cleaned:
            raise UserError(f"user {show(session.user_id)}: {field} = {show(list(queries))} has no usable text: fix it")
        return cleaned

    def _clean_all(self, texts: Sequence[str]) -> list[str]:
        return [cleaned for cleaned in map(self._clean, texts) if cleaned]

    def _clean(self, text: str) -> str:
        text = " ".join(text.split())
        while found := next((removed for removed in self._removed if removed in text), None):
            text = " ".join(text.replace(found, " ").split())  # again: what is left may have come together to another
        return text

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Ids without special tokens; verbose=False because a long history is not a mistake before its truncation."""
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def _ids_before_text(self) -> list[int]:
        """What the tokenizer puts before a text by default: [bos], or nothing."""
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a")["input_ids"]
        starts = (start for start in range(len(whole)) if plain and whole[start : start + len(plain)] == plain)
        return whole[: next(starts, 0)]


def _drops(history: History) -> Iterator[dict[str, int]]:
    """How many entries of each kind are left when 0, 1, 2, ... are dropped, until one is left."""
    left = {kind: len(entries) for kind, entries in history.items()}
    yield dict(left)
    for _ in range(sum(left.values()) - 1):
        longest = max(left, key=lambda kind: (left[kind], kind != "search"))
        left[longest] -= 1
        yield dict(left)
