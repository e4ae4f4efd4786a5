"""Character offsets of sampled tokens, on real tokenizers of every family, and the projection of word labels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tppo_fast.rewards import alignment
from tppo_fast.rewards.alignment import project, token_spans
from tppo_fast.rewards.labels import Labels

CORPUS = [
    "cheap flights to rome, pizza recipes, women's shoes",
    "caf\u00e9 cre\u0300me, na\u00efve fianc\u00e9e",
    "\u6771\u4eac \u5929\u6c17 \u5929\u6c17\u4e88\u5831, \u6771\u4eac\u30bf\u30ef\u30fc",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0643, \u05e9\u05dc\u05d5\u05dd",
    "\U0001f355\U0001f355 \U0001f468\u200d\U0001f469\u200d\U0001f467, \u0939\u093f\u0928\u094d\u0926\u0940",
] * 3
SPECIALS = ["<pad>", "<unk>", "<eos>"]
BYTES = [f"<0x{b:02X}>" for b in range(256)]


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens([AddedToken("<user>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrapped(tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrapped(tokenizer)


def byte_fallback() -> PreTrainedTokenizerFast:
    """The Llama 2 / Mistral kind."""
    letters = sorted({c for c in "".join(CORPUS) if c.isascii() and c != " "} | {"\u2581", "\u6771"})
    merges = [("\u2581", "r"), ("r", "o"), ("m", "e"), ("ro", "me"), ("\u2581r", "o"), ("z", "z")]
    vocab = {t: i for i, t in enumerate([*SPECIALS, *BYTES, *letters, *("".join(m) for m in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(tokenizer)


def wordpiece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrapped(tokenizer)


MAKERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte-level": byte_level,
    "metaspace": metaspace,
    "byte-fallback": byte_fallback,
    "wordpiece": wordpiece,
    "python": ByT5Tokenizer,
}
TOKENIZERS = {name: make() for name, make in MAKERS.items()}
EVERY = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
PIECES = ["byte-level", "metaspace", "byte-fallback"]
BY_PIECES = pytest.mark.parametrize("tokenizer", [TOKENIZERS[name] for name in PIECES], ids=PIECES)
UNICODE = st.one_of(
    st.text(max_size=12),
    st.lists(
        st.sampled_from(
            [*"ro me,.'\t\n\x00\x7f", "\u0301", "\u6771", "\u0645", "\U0001f355", "\u200d", "\ufffd", "\u2581"]
        )
    ).map("".join),
    st.sampled_from(CORPUS),
)


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[str, str]]:
    ids = [*encode(tokenizer, text), tokenizer.eos_token_id]
    text, spans = token_spans(tokenizer, ids)
    return [(str(tokenizer.convert_ids_to_tokens([i])[0]), text[s:e]) for i, (s, e) in zip(ids, spans, strict=True)]


def assert_aligned(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
    text, spans = token_spans(tokenizer, ids)
    assert text == decoded(tokenizer, ids)
    assert len(spans) == len(ids)
    reached = 0
    for i, (start, end) in zip(ids, spans, strict=True):
        assert 0 <= start <= end <= len(text)
        assert start <= reached, "a gap"
        assert i not in tokenizer.all_special_ids or start == end
        reached = max(reached, end)
    assert reached == len(text)
    assert [s for s, _ in spans] == sorted(s for s, _ in spans)


@EVERY
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_sampled_ids_align(tokenizer: PreTrainedTokenizerBase, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=20))
    assert_aligned(tokenizer, ids)


@EVERY
@settings(deadline=None, max_examples=60)
@given(text=UNICODE)
def test_any_text_aligns(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert_aligned(tokenizer, [*encode(tokenizer, text), tokenizer.eos_token_id])


@BY_PIECES
@settings(deadline=None, max_examples=60)
@given(text=UNICODE)
def test_pieces_and_prefixes_agree_on_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Two independent ways to the offsets; and the fast one is taken."""
    assume("\ufffd" not in text and "\u2581" not in text)
    ids = [*encode(tokenizer, text), tokenizer.eos_token_id]
    text = decoded(tokenizer, ids)
    fast = alignment._spans_by_pieces(tokenizer, ids, text)
    assert fast is not None
    exact = alignment._spans_by_prefixes(tokenizer, ids, text)
    assert [s for s in fast if s[0] < s[1]] == [s for s in exact if s[0] < s[1]]
    assert [s[0] == s[1] for s in fast] == [s[0] == s[1] for s in exact]


@BY_PIECES
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_random_ids_take_the_fast_way(tokenizer: PreTrainedTokenizerBase, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=20))
    assert alignment._spans_by_pieces(tokenizer, ids, decoded(tokenizer, ids)) is not None


@settings(deadline=None)
@given(data=st.data(), text=UNICODE)
def test_byte_level_tokens_cover_the_characters_whose_bytes_they_hold(data: st.DataObject, text: str) -> None:
    """Non-canonical tokenisation: every byte its own token, or the longest vocabulary entry, by chance."""
    tokenizer = TOKENIZERS["byte-level"]
    vocabulary = tokenizer.get_vocab()
    symbol = {b: c for c, b in alignment._byte_of_character().items()}
    owner = [n for n, c in enumerate(text) for _ in c.encode()]
    ids, expected, position, raw = [], [], 0, text.encode()
    while position < len(raw):
        lengths = [n for n in (1, 2, 3, 4) if "".join(symbol[b] for b in raw[position : position + n]) in vocabulary]
        length = min(data.draw(st.sampled_from(lengths)), len(raw) - position)
        ids.append(vocabulary["".join(symbol[b] for b in raw[position : position + length])])
        expected.append((owner[position], owner[position + length - 1] + 1))
        position += length
    assert token_spans(tokenizer, ids) == (text, expected)


def test_byte_level_example() -> None:
    assert pieces(TOKENIZERS["byte-level"], " rome,\u00fc") == [
        ("\u0120rome", " rome"), (",", ","), ("\u00c3", "\u00fc"), ("\u00bc", "\u00fc"), ("<eos>", ""),
    ]  # fmt: skip


def test_byte_fallback_example() -> None:
    assert pieces(TOKENIZERS["byte-fallback"], "rome \u6771\u4eac") == [
        ("\u2581ro", "ro"), ("me", "me"), ("\u2581", " "), ("\u6771", "\u6771"),
        ("<0xE4>", "\u4eac"), ("<0xBA>", "\u4eac"), ("<0xAC>", "\u4eac"), ("<eos>", ""),
    ]  # fmt: skip


def test_wordpiece_example() -> None:
    tokenizer = TOKENIZERS["wordpiece"]
    text, spans = token_spans(tokenizer, [*encode(tokenizer, "rome, pizza"), tokenizer.eos_token_id])
    assert text == "rome, pizza"  # the decoder's own clean-up removes the space before the comma
    assert "".join(text[s:e] for s, e in spans) == text
    assert spans[-1] == (11, 11)


def test_python_tokenizer_gives_each_byte_its_whole_character() -> None:
    tokenizer = TOKENIZERS["python"]
    ids = [*encode(tokenizer, "a\U0001f355b"), tokenizer.eos_token_id]
    assert token_spans(tokenizer, ids) == ("a\U0001f355b", [(0, 1), *[(1, 2)] * 4, (2, 3), (3, 3)])


def test_a_character_that_is_never_completed() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.convert_tokens_to_ids(["r", "\u00f0", "\u0141"])  # two of the four bytes of an emoji
    assert token_spans(tokenizer, ids) == ("r\ufffd", [(0, 1), (1, 2), (1, 2)])


def test_special_tokens_do_not_break_a_character() -> None:
    tokenizer = TOKENIZERS["byte-fallback"]
    ids = tokenizer.convert_tokens_to_ids(["<0xC3>", "<pad>", "<0xA9>", "<0xC3>", "o"])
    assert token_spans(tokenizer, ids)[0] == decoded(tokenizer, ids)
    assert_aligned(tokenizer, ids)


def test_an_id_outside_the_vocabulary_stands_for_nothing() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    rome = tokenizer.convert_tokens_to_ids("\u0120rome")
    assert token_spans(tokenizer, [rome, len(tokenizer) + 5, rome]) == (" rome rome", [(0, 5), (5, 5), (5, 10)])


def test_added_tokens_that_are_not_special_keep_their_text() -> None:
    tokenizer = TOKENIZERS["metaspace"]
    ids = [*encode(tokenizer, "rome"), tokenizer.convert_tokens_to_ids("<user>")]
    text, spans = token_spans(tokenizer, ids)
    assert text[slice(*spans[-1])] == "<user>"


def test_a_decoder_that_changes_text_falls_back_to_prefixes() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("rome", "Roma!")])
    ids = [*encode(tokenizer, "to rome"), tokenizer.eos_token_id]
    assert alignment._pieces_of(tokenizer) is None
    assert_aligned(tokenizer, ids)


def labels(spans: list[tuple[int, int]], classes: list[int]) -> Labels:
    return Labels(spans=spans, classes=classes, sentence=0)


def test_a_token_takes_the_class_of_the_word_it_shares_most_with() -> None:
    # "pizza, rome" as " pi" "zza, r" "ome" ""
    words = labels([(0, 5), (5, 6), (7, 11)], [2, 0, 1])
    assert project(words, [(0, 2), (2, 8), (8, 11), (11, 11)]) == [2, 2, 1, 0]


def test_ties_go_to_the_first_word_and_spaces_to_class_0() -> None:
    words = labels([(0, 2), (3, 5)], [1, 2])
    assert project(words, [(1, 4), (2, 3), (4, 5)]) == [1, 0, 2]
    assert project(labels([], []), [(0, 3), (3, 3)]) == [0, 0]


def test_every_token_of_a_split_character_inherits_its_word() -> None:
    assert project(labels([(1, 2)], [2]), [(0, 1), (1, 2), (1, 2), (1, 2)]) == [0, 2, 2, 2]


@settings(deadline=None)
@given(data=st.data())
def test_projection_equals_the_direct_definition(data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, 30), max_size=14)))
    spans = list(zip(cuts[::2], cuts[1::2], strict=False))
    words = labels(spans, data.draw(st.lists(st.integers(0, 2), min_size=len(spans), max_size=len(spans))))
    starts = sorted(data.draw(st.lists(st.integers(0, 30), max_size=10)))
    tokens = [(s, s + data.draw(st.integers(0, 8))) for s in starts]

    def direct(start: int, end: int) -> int:
        shared = [max(0, min(end, e) - max(start, s)) for s, e in spans]
        return words.classes[shared.index(max(shared))] if shared and max(shared) else 0

    assert project(words, tokens) == [direct(*token) for token in tokens]
