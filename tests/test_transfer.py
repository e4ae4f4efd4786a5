"""Words and scores between two tokenizers, on every family, with property tests on Unicode."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_alignment import BYTES, CORPUS, SPECIALS, TOKENIZERS, UNICODE, wrapped
from test_alignment import encode as encode_ids
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase

from tppo_fast.errors import UserError
from tppo_fast.rewards.alignment import project, token_spans
from tppo_fast.rewards.labels import Labels, Span
from tppo_fast.rewards.segment import query_words
from tppo_fast.rewards.token_model import Reader
from tppo_fast.rewards.transfer import overlap, spread, transfer


def bert() -> PreTrainedTokenizerBase:
    """WordPiece that lower-cases, strips accents and splits ideographs, as BERT and MiniLM do."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrapped(tokenizer)


def roberta() -> PreTrainedTokenizerBase:
    """Byte-level BPE with a space before the text and offsets without spaces, as RoBERTa and Longformer have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrapped(tokenizer)


def t5() -> PreTrainedTokenizerBase:
    """Unigram over NFKC-normalised text, which turns one character into several and several into one."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrapped(tokenizer)


assert BYTES  # the byte-fallback tokenizer of test_alignment
FAST = {name: t for name, t in TOKENIZERS.items() if t.is_fast} | {"bert": bert(), "roberta": roberta(), "t5": t5()}
WHOLE = ("byte-level", "byte-fallback", "metaspace", "roberta")  # no normaliser drops a visible character
EVERY = pytest.mark.parametrize("tokenizer", FAST.values(), ids=FAST.keys())
POLICIES = ("byte-level", "byte-fallback")
PAIRS = [pytest.param(FAST[rm], FAST[policy], id=f"{rm}<-{policy}") for rm, policy in product(FAST, POLICIES)]
WILD = st.one_of(
    UNICODE,
    st.lists(
        st.sampled_from(
            ["rome", " ", ", ", "e\u0301\u0323", "\u2167", "\ufb01ne", "\U0001f468\u200d\U0001f469\u200d\U0001f467",
             "\u6771\u4eac", "\u0645\u0631\u062d\u0628\u0627",
             "\u05e9\u05dc\u05d5\u05dd", "\u0939\u093f", "\U0001f1f5\U0001f1f9", "\u00dfS", "\u0130"]
        ),
        max_size=6,
    ).map("".join),
)  # fmt: skip


def read(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[Span]]:
    """The ids of a response as a reward model reads it, and the characters of ``text`` that each stands for."""
    reader = Reader(tokenizer=tokenizer, template="{history}", separator=",", max_tokens=10_000)
    (encoded,) = reader([["rome"]], [text])
    return [encoded.input_ids[i] for i in encoded.response], list(encoded.spans)


def words_of(text: str, data: st.DataObject) -> Labels:
    spans = query_words(text)
    classes = data.draw(st.lists(st.sampled_from([1, 2]), min_size=len(spans), max_size=len(spans)))
    return Labels(spans=spans, classes=classes, sentence=0)


@pytest.mark.parametrize("name", FAST)
@settings(deadline=None, max_examples=40)
@given(text=WILD)
def test_spans_are_ordered_and_cover_the_text(name: str, text: str) -> None:
    ids, spans = read(FAST[name], text)
    assert ids == encode_ids(FAST[name], " " + text.strip())
    assert all(0 <= start <= end <= len(text) for start, end in spans)
    assert [s for s, _ in spans] == sorted(s for s, _ in spans)
    if name in WHOLE:
        missed = set(range(len(text))) - {c for start, end in spans for c in range(start, end)}
        assert all(text[c].isspace() for c in missed)


@pytest.mark.parametrize("name", ["byte-level", "byte-fallback"])
@settings(deadline=None, max_examples=40)
@given(text=WILD)
def test_encoding_and_decoding_agree(name: str, text: str) -> None:
    """Offsets from the encoder, and from decoding what it made: two independent ways."""
    assume("\ufffd" not in text and "\u2581" not in text)
    text = " " + text.strip()
    ids, spans = read(FAST[name], text)
    decoded, back = token_spans(FAST[name], ids)
    assert decoded == text
    assert [_visible(text, s) for s in spans] == [_visible(text, s) for s in back]


def _visible(text: str, span: tuple[int, int]) -> set[int]:
    return {c for c in range(*span) if not text[c].isspace()}


@EVERY
@settings(deadline=None, max_examples=40)
@given(text=WILD, data=st.data())
def test_every_token_inside_a_word_has_its_class(
    tokenizer: PreTrainedTokenizerBase, text: str, data: st.DataObject
) -> None:
    labels = words_of(text, data)
    _, spans = read(tokenizer, text)
    for (start, end), kind in zip(spans, project(labels, spans), strict=True):
        inside = {c for (s, e), c in zip(labels.spans, labels.classes, strict=True) if s < end and start < e}
        assert kind in (inside or {0}) if start < end else kind == 0


@pytest.mark.parametrize(("rm", "policy"), PAIRS)
@settings(deadline=None, max_examples=15)
@given(text=WILD, data=st.data())
def test_classes_reach_the_policy_through_the_reward_model(
    rm: PreTrainedTokenizerBase, policy: PreTrainedTokenizerBase, text: str, data: st.DataObject
) -> None:
    """Words -> tokens of the reward model -> tokens of the policy = words -> tokens of the policy, at every policy token
    whose characters the reward model's tokens do not share with another word."""
    assume("\ufffd" not in text and "\u2581" not in text)
    labels = words_of(text, data)
    _, source = read(rm, text)
    decoded, target = token_spans(policy, encode_ids(policy, text))
    assert decoded == text
    spoken = [any(not c.isspace() for c in text[s:e]) for s, e in labels.spans]
    assert spread(np.array(spoken) * 2.0, labels.spans, target, text).sum() == pytest.approx(2.0 * sum(spoken))
    carried = transfer(np.array(project(labels, source)), source, target, text)
    for (start, end), got, want in zip(target, carried, project(labels, target), strict=True):
        touching = [s for s in source if s[0] < end and start < s[1]]
        around = {c for s in [(start, end), *touching] for c in range(*s)}
        kinds = {_class_at(labels, c) for c in around if not text[c].isspace()}
        if touching and kinds == {want}:
            assert got == pytest.approx(want, abs=1e-12)


def _class_at(labels: Labels, character: int) -> int:
    return next((c for (s, e), c in zip(labels.spans, labels.classes, strict=True) if s <= character < e), 0)


@pytest.mark.parametrize("tokenizer", [FAST["byte-level"], FAST["byte-fallback"]], ids=["byte-level", "byte-fallback"])
@settings(deadline=None, max_examples=60)
@given(text=WILD, data=st.data())
def test_the_same_tokenizer_gives_the_same_scores(
    tokenizer: PreTrainedTokenizerBase, text: str, data: st.DataObject
) -> None:
    text, spans = token_spans(tokenizer, encode_ids(tokenizer, text))
    scores = data.draw(st.lists(st.floats(-9, 9), min_size=len(spans), max_size=len(spans)))
    wanted = [score if text[start:end].strip() else -7.0 for score, (start, end) in zip(scores, spans, strict=True)]
    got = transfer(np.array(scores), spans, spans, text, default=-7.0)
    np.testing.assert_array_equal(got, wanted)


TILINGS = st.sets(st.integers(1, 29), max_size=12).map(lambda cuts: [0, *sorted(cuts), 30])


@settings(deadline=None)
@given(a=TILINGS, b=TILINGS, data=st.data())
def test_transfer_equals_the_direct_definition(a: list[int], b: list[int], data: st.DataObject) -> None:
    source, target = (list(pairwise(t)) for t in (a, b))
    scores = np.array(data.draw(st.lists(st.floats(-9, 9), min_size=len(source), max_size=len(source))))
    by_character = np.repeat(scores, [e - s for s, e in source])
    got = transfer(scores, source, target, "x" * 30)
    np.testing.assert_allclose(got, [by_character[s:e].mean() for s, e in target], atol=1e-12)
    sizes = np.array([e - s for s, e in target])
    assert (got * sizes).sum() == pytest.approx(by_character.sum(), abs=1e-9)  # nothing is lost or made
    assert transfer(np.full(len(source), 0.37), source, target, "x" * 30) == pytest.approx(0.37, abs=1e-12)


def test_worked_example() -> None:
    """The reward model has "rome" "," "rome", the policy " ro" "me" ", r" "ome", a space and eos."""
    text = " rome, rome "
    source, target = [(1, 5), (5, 6), (7, 11)], [(0, 3), (3, 5), (5, 8), (8, 11), (11, 12), (12, 12)]
    got = transfer(np.array([2.0, 0.0, 1.0]), source, target, text)
    np.testing.assert_allclose(
        got, [2, 2, 0.5, 1, 0, 0]
    )  # ", r" shares one visible character with each of the last two
    rows = transfer(np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]]), source, target, text, default=-1.0)
    np.testing.assert_allclose(rows, [[0, 1], [0, 1], [0.75, 0.25], [0.5, 0.5], [-1, -1], [-1, -1]])


def test_a_space_of_its_own_does_not_dilute_a_word() -> None:
    apart, together = [(0, 1), (1, 5)], [(0, 5)]
    np.testing.assert_allclose(transfer(np.array([0.0, 2.0]), apart, together, " rome"), [2])
    np.testing.assert_allclose(transfer(np.array([2.0]), together, apart, " rome"), [0, 2])


def test_a_character_split_into_bytes() -> None:
    one, three = [(0, 1)], [(0, 1), (0, 1), (0, 1)]
    np.testing.assert_allclose(transfer(np.array([5.0]), one, three, "\u4eac"), [5, 5, 5])
    np.testing.assert_allclose(transfer(np.array([1.0, 2.0, 6.0]), three, one, "\u4eac"), [3.0])
    np.testing.assert_allclose(transfer(np.array([1.0, 2.0, 6.0]), three, three, "\u4eac"), [1, 2, 6])
    np.testing.assert_allclose(overlap(three, one, "\u4eac").sum(), 1.0)


def test_a_repeated_word_is_told_apart_by_its_position() -> None:
    text = "rome, rome"
    labels = Labels(spans=[(0, 4), (4, 5), (6, 10)], classes=[2, 0, 1], sentence=1)
    for tokenizer in FAST.values():
        _, spans = read(tokenizer, text)
        classes = project(labels, spans)
        assert {c for c, (s, e) in zip(classes, spans, strict=True) if s < e <= 4} == {2}
        assert {c for c, (s, e) in zip(classes, spans, strict=True) if e > 6} == {1}


def test_scores_must_fit() -> None:
    with pytest.raises(UserError, match="2 rows for 1 source tokens"):
        transfer(np.zeros(2), [(0, 1)], [(0, 1)], "x")
