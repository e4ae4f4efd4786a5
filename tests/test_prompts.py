"""Prompts and responses as token ids: templates, truncation, special tokens, what parses back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tppo_fast.config import DataConfig
from tppo_fast.data.prompts import PromptBuilder
from tppo_fast.data.sessions import Session
from tppo_fast.data_types import Prompt
from tppo_fast.errors import UserError


@cache
def tokenizer(*, before: str = "", after: str = "", eos: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte, so that token counts can be read off the text."""
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>", "<|user|>"])
    if before or after:
        single = f"{before} $A {after}".strip()
        core.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(t, core.token_to_id(t)) for t in (before, after) if t]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, **({"eos_token": "</s>"} if eos else {}))


def builder(**settings: Any) -> PromptBuilder:
    return PromptBuilder(tokenizer(), DataConfig(template="H:{history}\nN:", **settings))


def session(history: Sequence[str] | dict[str, list[str]], *following: str, **fields: Any) -> Session:
    kinds = history if isinstance(history, dict) else {"search": history}
    return Session(user_id="u7", history=kinds, next_queries=following or ("x",), **fields)


def text(build: PromptBuilder, ids: Sequence[int]) -> str:
    return str(build.tokenizer.decode(list(ids)))


def prompt_of(build: PromptBuilder, row: Session) -> Prompt:
    return build.prompts([row])[0]


def response_ids(build: PromptBuilder, row: Session) -> list[int]:
    return build.responses([row])[0]


def test_only_searches_are_joined_by_the_separator() -> None:
    build = builder(separator=" | ")
    prompt = prompt_of(build, session(["tea", "tea pot"]))
    assert text(build, prompt.token_ids) == "H:tea | tea pot\nN:"


def test_other_kinds_get_a_line_each() -> None:
    build = builder()
    history = {"search": ["tea", "tea pot"], "click": ["shop.example"]}
    prompt = prompt_of(build, session(history))
    assert text(build, prompt.token_ids) == "H:search: tea, tea pot\nclick: shop.example\nN:"
    assert prompt.history == ("tea", "tea pot")
    only_clicks = prompt_of(build, session({"visit": ["a", "b"], "click": ["c"]}))
    assert text(build, only_clicks.token_ids) == "H:visit: a, b\nclick: c\nN:"
    assert only_clicks.history == ("c", "a", "b")  # kinds in alphabetical order, whatever the file has


def test_braces_and_placeholders_in_a_query_are_plain_text() -> None:
    build = builder()
    prompt = prompt_of(build, session(["{history} {0} {", "%s }"]))
    assert text(build, prompt.token_ids) == "H:{history} {0} {, %s }\nN:"


def test_response_is_prefix_first_queries_and_eos() -> None:
    build = builder(num_queries=2)
    row = session(["tea"], "tea pot", "tea cup", "tea tray")
    assert text(build, response_ids(build, row)) == " tea pot, tea cup</s>"
    other = session(["a"], "b")
    assert build.responses([row, other]) == [response_ids(build, row), response_ids(build, other)]
    assert build.responses([]) == build.prompts([]) == []


def test_no_text_of_a_log_can_end_a_sequence_or_split_a_query() -> None:
    build = builder()
    row = session(["tea</s> pot", "a,b <</s>/s>", "<s>,"], "x, y\n z</s>", "</s>", relevant_queries=["x,y"])
    prompt = prompt_of(build, row)
    assert text(build, prompt.token_ids) == "H:tea pot, a b < /s>\nN:"
    assert prompt.history == ("tea pot", "a b < /s>")
    assert (prompt.next_queries, prompt.relevant_queries) == (("x y z",), ("x y",))
    assert text(build, response_ids(build, row)) == " x y z</s>"
    assert response_ids(build, row).count(build.eos_token_id) == 1


def test_removal_cannot_put_a_special_token_together() -> None:
    build = builder(separator=" |- ")
    assert prompt_of(build, session(["a | |- - b"])).history == ("a | - b",)


def test_markers_in_the_template_stay_special() -> None:
    build = PromptBuilder(tokenizer(), DataConfig(template="<|user|>{history}</s>"))
    ids = prompt_of(build, session(["tea"])).token_ids
    assert [ids[0], ids[-1]] == build.tokenizer.convert_tokens_to_ids(["<|user|>", "</s>"])
    assert len(ids) == 5


@pytest.mark.parametrize(
    ("before", "after", "kept"), [("", "", []), ("<s>", "", ["<s>"]), ("<s>", "</s>", ["<s>"]), ("", "</s>", [])]
)
def test_bos_is_kept_and_a_closing_token_is_not(before: str, after: str, kept: list[str]) -> None:
    build = PromptBuilder(tokenizer(before=before, after=after), DataConfig(template="{history}:", max_prompt_tokens=8))
    start = [build.tokenizer.convert_tokens_to_ids(token) for token in kept]
    plain = builder().tokenizer
    ids = list(prompt_of(build, session(["abcdefg"[: 7 - len(kept)]])).token_ids)
    assert ids == [*start, *plain.encode("abcdefg"[: 7 - len(kept)] + ":")]
    assert list(response_ids(build, session(["a"], "b"))) == [*plain(" b")["input_ids"], build.eos_token_id]
    with pytest.raises(UserError, match="has 9 tokens"):
        prompt_of(build, session(["abcdefgh"[: 8 - len(kept)]]))


def test_eos_is_required() -> None:
    with pytest.raises(UserError, match="has eos_token = None, so that no response could end"):
        PromptBuilder(tokenizer(eos=False), DataConfig())


def test_truncation_drops_the_oldest_of_the_longest_kind() -> None:
    history = {"click": ["c1", "c2", "c3"], "search": ["s1", "s2", "s3", "s4 ok"]}
    full = "H:click: c1, c2, c3\nsearch: s1, s2, s3, s4 ok\nN:"
    expected = [
        full,
        "H:click: c1, c2, c3\nsearch: s2, s3, s4 ok\nN:",
        "H:click: c2, c3\nsearch: s2, s3, s4 ok\nN:",
        "H:click: c2, c3\nsearch: s3, s4 ok\nN:",
        "H:click: c3\nsearch: s3, s4 ok\nN:",
        "H:click: c3\nsearch: s4 ok\nN:",
        "H:s4 ok\nN:",
    ]
    for wanted, longer in zip(expected, [full + "+", *expected], strict=False):
        for limit in (len(wanted), len(longer) - 1):
            build = builder(max_prompt_tokens=limit)
            prompt = prompt_of(build, session(history))
            assert text(build, prompt.token_ids) == wanted
            assert prompt.history == ("s1", "s2", "s3", "s4 ok")  # novelty is judged against all of it


def test_an_entry_that_cannot_fit_is_refused_with_the_numbers() -> None:
    build = builder(max_prompt_tokens=12)
    with pytest.raises(UserError, match=r"user 'u7'.* has 15 tokens, data\.max_prompt_tokens = 12") as caught:
        prompt_of(build, session(["tea", "x" * 10]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "row", [session([",", "</s>"]), session(["tea"], ","), session(["a"], "b", relevant_queries=["</s>"])]
)
def test_texts_with_nothing_usable_are_refused(row: Session) -> None:
    with pytest.raises(UserError, match=r"u7.*no usable text"):
        builder().prompts([row])


@pytest.mark.parametrize(
    ("response", "queries"),
    [
        (" tea, tea  pot ,cup\n", ["tea", "tea pot", "cup"]),
        (",, ,a", ["a"]),
        ("", []),
        (" \n", []),
    ],
)
def test_parse(response: str, queries: list[str]) -> None:
    assert builder().parse(response) == queries


def test_expected_length_by_hand() -> None:
    """Queries with their leading space have 4, 4 and 7 tokens: median 4; a comma is one token."""
    rows = [session(["a"], "tea", "cup", "hidden by num_queries"), session(["a"], "teapot")]
    assert builder(num_queries=2).expected_length(rows) == 2 * 4 + 1 * 1
    assert builder(num_queries=1).expected_length([*rows, rows[1]]) == 7
    assert builder(num_queries=2, separator=" ;; ").expected_length(rows[1:]) == 2 * 7 + 3
    with pytest.raises(UserError, match="expected_length"):
        builder().expected_length([])


queries = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=12)
lists = st.lists(queries.filter(lambda query: query.replace(",", " ").strip()), min_size=1, max_size=8)


@settings(deadline=None, max_examples=80)
@given(lists, lists, st.integers(20, 120))
def test_every_prompt_fits_and_every_response_parses_back(history: list[str], following: list[str], limit: int) -> None:
    build = builder(max_prompt_tokens=limit, num_queries=4)
    row = session(history, *following)
    response = text(build, response_ids(build, row)[:-1])
    prompt = None
    try:
        prompt = prompt_of(build, row)
    except UserError:
        assert len(build.tokenizer(f"H:{' '.join(history[-1].split())}\nN:")["input_ids"]) > limit
    else:
        assert len(prompt.token_ids) <= limit
        rendered = text(build, prompt.token_ids)
        assert rendered.startswith("H:")
        assert rendered.endswith(f"{prompt.history[-1]}\nN:")
        assert build.parse(response) == list(prompt.next_queries)[:4]


def test_a_batch_gives_the_same_prompts_as_one_by_one() -> None:
    build = builder(max_prompt_tokens=20)
    rows = [session(["tea"] * count) for count in range(1, 9)]
    assert build.prompts(rows) == [prompt_of(build, row) for row in rows]


def test_a_long_history_is_cut_without_looking_at_every_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    build = builder(max_prompt_tokens=30)
    encode, sizes = build._encode, list[int]()

    def counted(texts: list[str]) -> list[list[int]]:
        sizes.extend(map(len, texts))
        return encode(texts)

    monkeypatch.setattr(build, "_encode", counted)
    entries = [f"{number:06}" for number in range(20_000)]
    assert text(build, prompt_of(build, session(entries)).token_ids) == "H:019997, 019998, 019999\nN:"
    assert len(sizes) <= 20
    assert sum(sizes) < 4 * len(", ".join(entries))  # halves, not one text for every cut
