"""The lexical labeller: words of any script, and rules under which neither repetition nor copying pays."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tppo_fast.errors import UserError
from tppo_fast.rewards.labels import Labels
from tppo_fast.rewards.lexical import LexicalLabeller, classify_queries
from tppo_fast.words import normalise_query, stem, word_spans

LABEL = LexicalLabeller()
VOCABULARY = st.sampled_from(
    ["rome", "romes", "paris", "pizza", "pizzas", "x", ",", ", ", " ", "!", "\U0001f355", "\u0301"]
)
TEXT = st.one_of(st.lists(VOCABULARY, max_size=12).map(" ".join), st.text(max_size=20))


def by_word(labels: Labels, text: str) -> list[tuple[str, int]]:
    return [(text[s:e], c) for (s, e), c in zip(labels.spans, labels.classes, strict=True)]


def words(text: str) -> list[str]:
    return [text[s:e] for s, e in word_spans(text)]


def test_words_separators_and_the_sentence_label() -> None:
    text = " Pizza recipe, cheap flights"
    labels = LABEL(["italian food"], ["pizza RECIPES", "pasta"], text)
    assert by_word(labels, text) == [("Pizza", 2), ("recipe", 2), (",", 0), ("cheap", 1), ("flights", 1)]
    assert labels.sentence == 1  # two of four words: at least half


def test_sentence_needs_half_of_the_words() -> None:
    assert LABEL([], ["pizza"], "pizza").sentence == 1
    assert LABEL([], ["pizza"], "pizza now, please").sentence == 0
    assert LABEL([], ["pizza"], "").sentence == LABEL([], ["pizza"], " ,, ").sentence == 0


def test_repeating_a_word_inside_one_query_does_not_pay() -> None:
    truth = ["pizza rome", "pizza paris", "pizza berlin"]
    assert classify_queries([], truth, ["pizza pizza pizza rome"]) == [[2, 1, 1, 2]]
    assert classify_queries([], ["new york new york"], ["new new new york"]) == [[2, 2, 1, 2]]


def test_a_stem_is_relevant_at_most_as_often_as_all_true_queries_use_it() -> None:
    truth = ["pizza rome", "pizza paris"]
    assert classify_queries([], truth, ["pizza a", "pizza b", "pizza c"]) == [[2, 1], [2, 1], [1, 1]]


def test_a_wrong_repetition_takes_nothing_from_a_later_right_word() -> None:
    assert classify_queries([], ["pizza rome", "pizza paris"], ["pizza pizza", "pizza"]) == [[2, 1], [2]]


def test_the_same_true_query_twice_gives_no_second_allowance() -> None:
    assert classify_queries([], ["pizza", "Pizza!"], ["pizza a", "pizza b"]) == [[2, 1], [1, 1]]


def test_a_copy_of_the_history_is_irrelevant_even_where_it_is_true() -> None:
    assert classify_queries(["Pizza Rome"], ["pizza rome"], ["pizza, rome!", "rome pizza now"]) == [[1, 1], [2, 2, 1]]


def test_a_query_repeated_in_the_response_is_irrelevant() -> None:
    assert classify_queries([], ["pizza rome", "rome pizza hut"], ["pizza rome", "Pizza rome"]) == [[2, 2], [1, 1]]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("recipes", "recipe"),
        ("Women's", "women"),
        ("women\u2019s", "womens"),
        ("\uff30\uff29\uff3a\uff3a\uff21", "pizza"),  # full-width letters
        ("cafe\u0301", "caf\u00e9"),
        ("STRASSE", "stra\u00dfe"),
        ("co\u00adop", "coop"),  # soft hyphen
    ],
)
def test_stems_that_are_one_word(left: str, right: str) -> None:
    assert stem(left) == stem(right)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("covid-19 (2020)", ["covid", "19", "2020"]),
        ("rock'n'roll 'quoted'", ["rock'n'roll", "quoted"]),
        ("cafe\u0301 \u0939\u093f\u0928\u094d\u0926\u0940", ["cafe\u0301", "\u0939\u093f\u0928\u094d\u0926\u0940"]),
        ("\u6771\u4eac\u30bf\u30ef\u30fc", ["\u6771", "\u4eac", "\u30bf\u30ef\u30fc"]),
        (
            "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
            ["\u05e9\u05dc\u05d5\u05dd", "\u0645\u0631\u062d\u0628\u0627"],
        ),
        ("pizza\U0001f355 \U0001f44d\U0001f3fd", ["pizza", "\U0001f355", "\U0001f44d\U0001f3fd"]),
        ("a_b\u200bc\x00d", ["a", "b\u200bc", "d"]),
        (" ,;!? \u0301 \u2800 \u3164 \ufe0f", []),
    ],
)
def test_word_spans(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_an_emoji_is_a_word_and_costs() -> None:
    assert LABEL([], ["pizza"], "\U0001f355").classes == [1]


def test_normal_form_of_a_query() -> None:
    assert normalise_query('  "Women\u2019s SHOES", size-8 ') == "womens shoes size 8"
    assert normalise_query("?!") == ""


@pytest.mark.parametrize(
    "query",
    [
        "rome\ufe0f hotels",  # variation selector
        "rome\u034f hotels",  # combining grapheme joiner
        "rome\u3164 hotels", "rome\uffa0 hotels", "\u115frome hotels\u1160",  # Hangul fillers
        "ro\u200bme hotels", "rome\u2065 hotels", "rome hotels\U000e0101",
        "rome hotels \u2800", "rome\u2800hotels",  # an empty Braille cell
    ],
)  # fmt: skip
def test_what_shows_nothing_makes_no_new_query(query: str) -> None:
    assert classify_queries(["rome hotels"], ["rome hotels"], [query]) == [[1, 1]]
    assert normalise_query(query) == "rome hotels"


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("\u2764\ufe0f", "\u2764"),  # the same heart
        ("e\u200d\u0301", "\xe9"),  # a joiner between letter and accent
        ("5\u338f", "5kg"), ("\u337b", "\u5e73\u6210"),  # one character for several
    ],
)  # fmt: skip
def test_queries_that_are_one(left: str, right: str) -> None:
    assert normalise_query(left) == normalise_query(right)


@pytest.mark.parametrize("separator", [" | ", ";", "\n* ", "||"])
def test_the_separator_splits_by_its_visible_part(separator: str) -> None:
    text = f"rome{separator}paris{separator.strip()}rome"
    labels = LexicalLabeller(separator=separator)([], ["rome"], text)
    assert by_word(labels, text) == [
        ("rome", 2), (separator.strip(), 0), ("paris", 1), (separator.strip(), 0), ("rome", 1),
    ]  # fmt: skip


def test_a_separator_made_of_letters_is_class_0() -> None:
    assert LexicalLabeller(separator=" OR ")([], ["rome or paris"], "rome OR paris").classes == [2, 0, 2]


def test_words_are_judged_as_part_of_their_query() -> None:
    """Relevant words of several true queries thrown together in one query pay for one of them alone."""
    truth = ["tent manual", "tent reviews", "tent repair"]
    assert classify_queries([], truth, ["tent manual reviews repair"]) == [[2, 2, 1, 1]]
    assert classify_queries([], truth, ["tent sizes", "tent manual"]) == [[2, 1], [2, 2]]
    assert classify_queries([], truth, ["tent manual", "tent manual now"]) == [[2, 2], [2, 1, 1]]


def test_queries_past_the_asked_number_are_irrelevant() -> None:
    truth = ["tent manual", "tent reviews"]
    assert classify_queries([], truth, ["tent x", "tent manual"], num_queries=1) == [[2, 1], [1, 1]]
    assert LexicalLabeller(num_queries=1)([], truth, "tent x, tent manual").classes == [2, 1, 0, 1, 1]
    assert LexicalLabeller(num_queries=1)([], truth, ", , tent manual").classes == [
        0,
        0,
        2,
        2,
    ]  # empty pieces are no queries


@settings(deadline=None)
@given(truth=st.lists(TEXT, max_size=3), response=TEXT, more=TEXT)
def test_labels_are_causal(truth: list[str], response: str, more: str) -> None:
    """Without a history to copy, what is appended as a further word changes no earlier label."""
    before = LABEL([], truth, response + " x")
    after = LABEL([], truth, response + " x " + more)
    queries = [normalise_query(q) for q in (response + " x " + more).split(",")]
    if len(set(queries)) == len(queries):  # no query repeats another one: the novelty rule has nothing to say
        kept = len(before.classes)
        assert after.classes[:kept] == before.classes


@pytest.mark.parametrize(
    ("settings_", "expected"), [({"separator": " "}, "separator = ' '"), ({"language": "klingon"}, "Snowball knows")]
)
def test_bad_settings_are_named(settings_: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        LexicalLabeller(**settings_)


def test_other_languages_stem_by_their_own_algorithm() -> None:
    german = LexicalLabeller(language="german")
    assert german([], ["häuser kaufen"], "haus kauf").classes == [2, 2]
    assert LABEL([], ["häuser kaufen"], "haus kauf").classes == [1, 1]


@pytest.mark.parametrize(
    ("spans", "classes", "sentence", "expected"),
    [
        ([(0, 2)], [], 0, "one class per span"),
        ([(0, 2)], [3], 0, "class 3"),
        ([(0, 2)], [1], 2, "sentence = 2"),
        ([(0, 2), (1, 3)], [1, 1], 0, r"span \(1, 3\)"),
        ([(2, 2)], [1], 0, r"span \(2, 2\)"),
        ([(-1, 2)], [1], 0, r"span \(-1, 2\)"),
    ],
)
def test_impossible_labels_are_refused(spans: list, classes: list, sentence: int, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        Labels(spans=spans, classes=classes, sentence=sentence)


@settings(deadline=None)
@given(history=st.lists(TEXT, max_size=3), truth=st.lists(TEXT, max_size=3), response=TEXT)
def test_relevant_words_never_exceed_what_the_truth_justifies(
    history: list[str], truth: list[str], response: str
) -> None:
    labels = LABEL(history, truth, response)  # Labels itself checks order and overlap
    relevant = [response[s:e] for (s, e), c in zip(labels.spans, labels.classes, strict=True) if c == 2]
    allowed = [stem(query[s:e]) for query in truth for s, e in word_spans(query)]
    for word in {stem(word) for word in relevant}:
        assert [stem(w) for w in relevant].count(word) <= allowed.count(word)
    assert all(e <= len(response) for _, e in labels.spans)


@settings(deadline=None)
@given(
    truth=st.lists(TEXT, min_size=1, max_size=3, unique_by=normalise_query).filter(
        lambda t: all(map(normalise_query, t))
    )
)
def test_the_true_queries_themselves_are_all_relevant(truth: list[str]) -> None:
    assert {c for classes in classify_queries([], truth, truth) for c in classes} == {2}


@settings(deadline=None)
@given(query=st.text(max_size=20))
def test_the_normal_form_is_stable_under_case_and_compatibility(query: str) -> None:
    form = normalise_query(query)
    assert normalise_query(form) == form
