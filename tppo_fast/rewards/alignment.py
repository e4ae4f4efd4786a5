"""From characters to sampled tokens: exact offsets for any tokenizer, and the projection of word labels onto tokens.

Sampled ids are rarely what re-encoding their text would give, so the offsets come from DECODING. Tokenizers whose
decoder is byte-level or sentencepiece-like decode token by token, from cached pieces; the result is compared with
``tokenizer.decode`` and, where anything differs, or for any other tokenizer, prefixes are decoded one by one instead.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tppo_fast.data_types import Rollout
from tppo_fast.errors import UserError
from tppo_fast.rewards.labels import SEPARATOR, Labels, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_METASPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def token_spans(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> tuple[str, list[Span]]:
    """The text of sampled tokens and the characters each token stands for.

    A token that holds part of a character's bytes gets the whole character, so neighbouring spans may share one.
    Special tokens, ids outside the vocabulary and spaces that the decoder drops get an empty span. Starts never
    decrease, and together the spans cover the text.

    Returns:
        ``tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)``, and one
        (start, end) per token.
    """
    ids = [int(i) for i in token_ids]
    text = _decode(tokenizer, ids)
    spans = _spans_by_pieces(tokenizer, ids, text)
    return text, _spans_by_prefixes(tokenizer, ids, text) if spans is None else spans


def rollout_spans(tokenizer: PreTrainedTokenizerBase, rollout: Rollout, index: int) -> list[Span]:
    """The characters of ``rollout.text`` that each of its tokens stands for.

    Raises:
        UserError: the text is not what the tokens decode to; ``index`` names the rollout.
    """
    text, spans = token_spans(tokenizer, rollout.token_ids)
    if text != rollout.text:
        raise UserError(
            f"rollout {index}: its text {rollout.text!r} is not what its tokens decode to ({text!r}): "
            "use the tokenizer and decoding of the rollout engine"
        )
    return spans


def project(labels: Labels, spans: Sequence[Span]) -> list[int]:
    """The class of each token: that of the word it shares most characters with (ties: the first), else 0.

    ``spans`` as from ``token_spans`` (starts never decrease). Linear in words plus tokens.
    """
    classes, first, words = [], 0, labels.spans
    for start, end in spans:
        while first < len(words) and words[first][1] <= start:
            first += 1
        chosen, most, word = SEPARATOR, 0, first
        while word < len(words) and words[word][0] < end:
            shared = min(end, words[word][1]) - max(start, words[word][0])
            if shared > most:
                chosen, most = labels.classes[word], shared
            word += 1
        classes.append(chosen)
    return classes


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)  # a list only comes back for a batch
    return text


# ---------------------------------------------------------------------------------------------- by cached pieces


class _Pieces:
    """The bytes each token id adds to the decoded text, remembered per tokenizer."""

    def __init__(self, backend: Any, byte_level: bool) -> None:
        self._backend = backend
        self._byte_level = byte_level
        self._special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self._known: dict[int, bytes] = {}
        self._byte_ids: set[int] = set()

    def __call__(self, ids: list[int]) -> list[bytes]:
        pieces = [self._known[i] if i in self._known else self._learn(i) for i in ids]
        if not self._byte_ids.isdisjoint(ids):
            self._settle_byte_runs(ids, pieces)
        return pieces

    def _learn(self, i: int) -> bytes:
        token = None if i in self._special else self._backend.id_to_token(i)
        if token is None:
            piece = b""
        elif self._byte_level:
            table = _byte_of_character()
            piece = bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            piece = bytes.fromhex(token[3:5])
            self._byte_ids.add(i)
        else:
            piece = token.replace(_METASPACE, " ").encode()
        self._known[i] = piece
        return piece

    def _settle_byte_runs(self, ids: list[int], pieces: list[bytes]) -> None:
        """Byte fallback decodes a run of byte tokens as a whole; one invalid byte turns each into U+FFFD."""
        run: list[int] = []
        for position, i in enumerate([*ids, None]):
            if i in self._byte_ids:
                run.append(position)
            elif i is None or pieces[position]:  # skipped tokens do not end a run
                if not _is_utf8(b"".join(pieces[p] for p in run)):
                    for p in run:
                        pieces[p] = _REPLACEMENT.encode()
                run = []


_PIECES: WeakKeyDictionary[Any, _Pieces | None] = WeakKeyDictionary()


def _pieces_of(tokenizer: PreTrainedTokenizerBase) -> _Pieces | None:
    if tokenizer not in _PIECES:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        kinds = _decoder_kinds(getattr(backend, "decoder", None))
        if kinds == {"ByteLevel"}:
            _PIECES[tokenizer] = _Pieces(backend, byte_level=True)
        elif kinds and kinds <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
            _PIECES[tokenizer] = _Pieces(backend, byte_level=False)
        else:
            _PIECES[tokenizer] = None
    return _PIECES[tokenizer]


def _decoder_kinds(decoder: Any) -> set[str]:
    """The types in a ``tokenizers`` decoder, which shows itself only as JSON."""
    if decoder is None or not hasattr(decoder, "__getstate__"):
        return set()
    state = json.loads(decoder.__getstate__())
    return {part["type"] for part in state.get("decoders", [state])}


def _spans_by_pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> list[Span] | None:
    """Spans from cached pieces, or None where they do not add up to ``text``."""
    source = _pieces_of(tokenizer)
    if source is None:
        return None
    pieces = source(ids)
    raw = b"".join(pieces)
    joined, owner = _decode_lossy(raw)
    dropped = len(joined) - len(text)  # sentencepiece drops the leading space
    if dropped < 0 or joined[dropped:] != text or joined[:dropped].strip(" "):
        return None
    spans, offset = [], 0
    owner.append(len(joined))
    for piece in pieces:
        stop = offset + len(piece)
        end = owner[stop - 1] + 1 if piece else owner[offset]
        spans.append((max(owner[offset] - dropped, 0), max(end - dropped, 0)))
        offset = stop
    return spans


def _decode_lossy(raw: bytes) -> tuple[str, list[int]]:
    """UTF-8 with U+FFFD for each invalid subpart, and for every byte the character it belongs to."""
    if raw.isascii():
        return raw.decode(), list(range(len(raw)))
    parts: list[str] = []
    owner: list[int] = []
    while raw:
        try:
            valid, bad, rest = raw.decode(), 0, b""
        except UnicodeDecodeError as error:
            valid, bad, rest = raw[: error.start].decode(), error.end - error.start, raw[error.end :]
        for character in valid:
            owner += [len(parts)] * len(character.encode())
            parts.append(character)
        if bad:
            owner += [len(parts)] * bad
            parts.append(_REPLACEMENT)
        raw = rest
    return "".join(parts), owner


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """The printable characters that stand for bytes in byte-level BPE (GPT-2): printable Latin-1, then from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


# ------------------------------------------------------------------------------------------------- by prefixes


def _spans_by_prefixes(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> list[Span]:
    """Spans from decoding every prefix: exact for any tokenizer, quadratic in the response length."""
    special = set(tokenizer.all_special_ids)
    spans: list[Span] = []
    settled = 0  # characters of the text that the tokens so far have completed
    silent: list[int] = []  # positions of tokens that have shown nothing yet
    for n, i in enumerate(ids):
        if i in special:
            spans.append((settled, settled))
            continue
        prefix = _decode(tokenizer, ids[: n + 1]) if n + 1 < len(ids) else text
        common = max(settled, _common(prefix, text))
        unfinished = len(prefix) > common  # shows U+FFFD where the text will have a character
        start, end = settled, min(common + unfinished, len(text))
        spans.append((start, end))
        if start == end:
            silent.append(n)
            continue
        if silent and not text[start].isascii() and not _decode(tokenizer, [i]):  # they hold its first bytes
            for position in silent:
                spans[position] = (start, start + 1)
        silent, settled = [], common
    return spans


def _common(prefix: str, text: str) -> int:
    """Length of the longest common prefix."""
    if text.startswith(prefix):
        return len(prefix)
    return next(n for n, c in enumerate(prefix) if n == len(text) or c != text[n])
