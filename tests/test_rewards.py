"""From a reward source to one reward per token: validation, scale, length penalty, placement, display."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tppo_fast.config import RewardConfig
from tppo_fast.data_types import Prompt, Rollout
from tppo_fast.errors import UserError
from tppo_fast.plugins import load_object
from tppo_fast.rewards import Labels, LexicalLabeller, TokenRewards, build_reward, label_with
from tppo_fast.rewards.display import examples_table
from tppo_fast.rewards.length_penalty import lwp


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows the words of the example as whole tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([" lisbon hotels, pasta"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")


TOKENIZER = make_tokenizer()
PLAIN = {"length_penalty": False, "scale": "centred"}


def response(
    text: str, history: Sequence[str] = ("porto",), truth: Sequence[str] = ("lisbon hotels",), end: bool = True
) -> Rollout:
    ids = TOKENIZER.encode(text, add_special_tokens=False) + [TOKENIZER.eos_token_id] * end
    prompt = Prompt(token_ids=[1], user_id="u", history=history, next_queries=truth, relevant_queries=truth)
    return Rollout(
        prompt=prompt, token_ids=ids, logprobs=[0.0] * len(ids), text=text, finish_reason="stop", policy_version=0
    )


def rewards(source: Callable[..., Any] | None = None, expected_length: float = 100.0, **settings_: Any) -> TokenRewards:
    if source is None:
        return build_reward(RewardConfig(**settings_), TOKENIZER, expected_length=expected_length, separator=", ")
    config = RewardConfig(source="tests:given", **settings_)
    return TokenRewards(source=source, config=config, tokenizer=TOKENIZER, expected_length=expected_length)


ROLLOUT = response(" lisbon hotels, pasta")  # " lisbon" " hotels" "," " pasta" eos, as the next test pins down


def test_labels_may_be_arrays() -> None:
    arrays = Labels(spans=np.array([[1, 7], [9, 14]]), classes=np.array([2, 1]), sentence=1)  # type: ignore[arg-type]
    assert arrays == Labels(spans=[(1, 7), (9, 14)], classes=[2, 1], sentence=1)
    assert rewards(lambda _: [arrays], **PLAIN)([ROLLOUT])
    for wrong in (None, [1, 7], [(1.5, 7.0)], [(1, 7, 9)]):
        with pytest.raises(UserError, match=r"give a .start, end. of whole numbers for each word"):
            Labels(spans=wrong, classes=[2], sentence=1)  # type: ignore[arg-type]


def test_a_source_that_sorts_what_it_is_given_is_named() -> None:
    """It would pay each rollout for another one's response."""

    def longest_first(rollouts: list[Rollout]) -> list[float]:
        rollouts.sort(key=lambda r: -len(r.token_ids))
        return [float(len(r.token_ids)) for r in rollouts]

    given = [response(" pasta"), ROLLOUT]
    with pytest.raises(UserError, match=r"reward 'tests:given' failed with AttributeError .*'sort'"):
        rewards(longest_first)(given)
    assert given[1] is ROLLOUT


def test_lexical_classes_and_centred_rewards() -> None:
    assert TOKENIZER.convert_ids_to_tokens(ROLLOUT.token_ids) == ["Ġlisbon", "Ġhotels", ",", "Ġpasta", "</s>"]
    reward = rewards(**PLAIN)
    assert reward.explain([ROLLOUT])[1] == [[2, 2, 0, 1, 0]]
    (values,) = reward([ROLLOUT])
    assert values.dtype == torch.float32
    assert values.tolist() == [1.0, 1.0, 0.0, -1.0, 0.0]


def test_paper_scale_and_coefficient() -> None:
    assert rewards(scale="paper", coefficient=0.5, length_penalty=False)([ROLLOUT])[0].tolist() == [
        1.0,
        1.0,
        0.0,
        0.5,
        0.0,
    ]


def test_length_penalty_counts_positions_from_one() -> None:
    (values,) = rewards(scale="centred", expected_length=1.0, length_alpha=2.0)([ROLLOUT])
    expected = torch.tensor([1.0, 1.0, 0.0, -1.0, 0.0]) * lwp([1, 2, 3, 4, 5], 1.0, 2.0)
    torch.testing.assert_close(values, expected)
    assert values[3].item() == pytest.approx(-0.5, abs=1e-6)  # position 4 is sl + 3


def test_numbers_of_an_own_reward_are_taken_as_they_are_unless_a_penalty_is_asked_for() -> None:
    def numbers(rollouts: Sequence[Rollout]) -> list[list[float]]:
        return [[1.0] * len(r.token_ids) for r in rollouts]

    (plain,) = rewards(numbers, expected_length=1.0)([ROLLOUT])
    assert plain.tolist() == [1.0] * 5
    (penalised,) = rewards(numbers, expected_length=1.0, length_penalty=True)([ROLLOUT])
    torch.testing.assert_close(penalised, lwp([1, 2, 3, 4, 5], 1.0, 2.0))


def test_the_configured_expected_length_wins() -> None:
    assert rewards(expected_length=7.0).expected_length == 7.0
    assert rewards(expected_length=7.0).config.expected_length is None
    config = RewardConfig(expected_length=3.0)
    assert build_reward(config, TOKENIZER, expected_length=7.0, separator=",").expected_length == 3.0


def test_placement_last_is_the_same_signal_summed_onto_the_last_token() -> None:
    rollouts = [ROLLOUT, response("lisbon", end=False), response(" flights to lisbon, lisbon lisbon")]
    settings_ = {"expected_length": 2.0, "coefficient": 0.7}
    dense, sparse = rewards(**settings_)(rollouts), rewards(placement="last", **settings_)(rollouts)
    for token, last in zip(dense, sparse, strict=True):
        assert last[-1].item() == pytest.approx(token.sum().item(), abs=1e-6)
        assert not last[:-1].any()
        assert last.shape == token.shape


def test_ending_a_copied_query_is_what_costs() -> None:
    """ " hotels" may go on to " hotels pasta": the separator makes it a copy of the history, the end one of the first query."""
    given = response(" hotels, pasta, pasta", history=("Hotels",), truth=("hotels pasta", "pasta"))
    assert TOKENIZER.convert_ids_to_tokens(given.token_ids) == ["Ġhotels", ",", "Ġpasta", ",", "Ġpasta", "</s>"]
    plain, strict = (rewards(reject_copies=on, **PLAIN) for on in (False, True))
    assert plain([given])[0].tolist() == [-1.0, 0.0, 1.0, 0.0, -1.0, 0.0]
    assert strict([given])[0].tolist() == [-1.0, -2.0, 1.0, 0.0, -1.0, -2.0]
    assert strict.explain([given])[1] == plain.explain([given])[1] == [[1, 0, 2, 0, 1, 0]]
    lenient = rewards(
        lambda _: [Labels(spans=[(1, 7), (9, 14)], classes=[2, 2], sentence=1)], reject_copies=True, **PLAIN
    )
    assert lenient([given])[0].tolist() == [-1.0, -2.0, 1.0, 0.0, 0.0, -2.0]  # whatever the labeller said
    cut = replace(given, token_ids=given.token_ids[:-1], logprobs=[0.0] * 5, finish_reason="length")
    assert strict([cut])[0].tolist() == [-1.0, -2.0, 1.0, 0.0, -1.0]  # nobody ended the last one
    (last,) = rewards(reject_copies=True, placement="last", **PLAIN)([given])
    assert last.tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, -5.0]
    (sentence,) = rewards(reject_copies=True, placement="sentence", **PLAIN)([given])
    assert sentence.tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, -1.0]
    content = lambda _: [Labels(spans=[(1, 7), (9, 14), (16, 21)], classes=[2, 2, 2], sentence=1)]  # noqa: E731
    for on, value in ((False, 1.0), (True, -1.0)):  # two of its three words are copies
        (sentence,) = rewards(content, reject_copies=on, placement="sentence", **PLAIN)([given])
        assert sentence[-1].item() == value
    with pytest.raises(UserError, match=r"reward\.reject_copies needs labels"):
        rewards(lambda _: [1.0], reject_copies=True)([given])


@pytest.mark.parametrize("placement", ["token", "last"])
def test_scalar_rewards_land_on_the_last_token_without_length_penalty(placement: str) -> None:
    reward = rewards(lambda rollouts: [3.0] * len(rollouts), expected_length=0.0, coefficient=2.0, placement=placement)
    assert [r.tolist() for r in reward([ROLLOUT, ROLLOUT])] == [[0.0, 0.0, 0.0, 0.0, 6.0]] * 2
    assert reward.explain([ROLLOUT])[1] is None


@pytest.mark.parametrize(
    "output",
    [
        [[1, 2, 3, 4, 5]],
        [(1.0, 2.0, 3.0, 4.0, 5.0)],
        torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]], requires_grad=True),
        [torch.tensor([1, 2, 3, 4, 5], dtype=torch.bfloat16)],
        np.array([[5, 4, 3, 2, 1]], dtype=np.float32)[:, ::-1],
        [[torch.tensor(float(i)) for i in range(1, 6)]],
    ],
    ids=["ints", "tuple", "tensor", "bfloat16", "reversed array", "list of tensors"],
)
def test_per_token_rewards_in_any_container(output: Any) -> None:
    (values,) = rewards(lambda _: output, **PLAIN)([ROLLOUT])
    assert values.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert not values.requires_grad


@pytest.mark.parametrize(
    "output", [[2.0], [2], [np.float32(2)], torch.tensor([2.0]), np.array([2.0]), [torch.tensor(2)]]
)
def test_scalars_in_any_container(output: Any) -> None:
    assert rewards(lambda _: output)([ROLLOUT])[0].tolist() == [0.0, 0.0, 0.0, 0.0, 2.0]


def test_a_response_of_one_token_and_an_empty_batch() -> None:
    one = response("lisbon", end=False)
    assert rewards(lambda _: [[2.0] * len(one.token_ids)], **PLAIN)([one])[0].tolist() == [2.0] * len(one.token_ids)
    assert rewards()([]) == []


GOOD = [0.0] * 5


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ([1.0], "returned 1 items for 2 rollouts"),
        (None, "returned None, expected one float"),
        (1.0, "returned a float, expected"),
        (torch.tensor(1.0), "returned a single number"),
        ({0: 1.0, 1: 1.0}, "returned a dict"),
        ("ab", "returned a str"),
        ([1.0, float("nan")], "rollout 1: reward nan, expected a finite number"),
        ([1e39, 1.0], r"rollout 0: reward 1e\+39, expected a finite number"),
        ([GOOD, [0.0, 0.0, float("-inf"), 0.0, 0.0]], "rollout 1: reward -inf at token 2"),
        ([GOOD, GOOD[1:]], r"rollout 1: shape \[4\], expected a float or \[5\]"),
        ([GOOD, [GOOD]], r"rollout 1: shape \[1, 5\]"),
        ([GOOD, 1.0], "rollout 1: a float and a sequence in one batch"),
        ([1.0, "2.0"], "rollout 1: a str, expected a float"),
        ([1.0, None], "rollout 1: None, expected a float"),
        ([1.0, 1j], "rollout 1: a complex, expected"),
        ([1.0, torch.tensor(1j)], "rollout 1: a Tensor, expected"),
        ([[[1.0], [1.0, 2.0]], GOOD], "rollout 0: a list, expected"),
        ([1.0, Labels(spans=[], classes=[], sentence=0)], "rollout 0: a float among Labels"),
        (
            [Labels(spans=[(0, 99)], classes=[1], sentence=0)] * 2,
            r"rollout 0: span \(0, 99\) ends past the response's 21",
        ),
    ],
)
def test_a_wrong_answer_is_named(output: Any, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        rewards(lambda _: output)([ROLLOUT, ROLLOUT])
    assert "'tests:given'" in str(caught.value)


def test_an_exception_of_the_reward_function_says_where() -> None:
    def broken(rollouts: Sequence[Rollout]) -> list[float]:
        return [1 / (len(rollouts) - 1)]

    with pytest.raises(UserError, match=r"reward 'tests:given' failed with ZeroDivisionError .*test_rewards\.py:\d+"):
        rewards(broken)([ROLLOUT])


def test_text_of_another_tokenizer_is_refused() -> None:
    wrong = Rollout(
        prompt=ROLLOUT.prompt,
        token_ids=ROLLOUT.token_ids,
        logprobs=ROLLOUT.logprobs,
        text="lisbon",
        finish_reason="stop",
        policy_version=0,
    )
    with pytest.raises(UserError, match="rollout 1: its text 'lisbon' is not what its tokens decode to"):
        rewards()([ROLLOUT, wrong])


def test_an_own_labeller_is_aligned_and_scaled() -> None:
    def first_word(history: Sequence[str], truth: Sequence[str], text: str, /) -> Labels:
        assert (list(history), list(truth)) == (["porto"], ["lisbon hotels"])
        start = text.index("lisbon")
        return Labels(spans=[(start, start + 6)], classes=[2], sentence=1)

    reward = rewards(label_with(first_word), scale="paper", length_penalty=False)
    assert reward.explain([ROLLOUT])[1] == [[2, 0, 0, 0, 0]]
    assert reward([ROLLOUT])[0].tolist() == [2.0, 0.0, 0.0, 0.0, 0.0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory; what is imported from it is forgotten again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_a_reward_file_in_the_current_directory(folder: Path) -> None:
    (folder / "my_reward.py").write_text(
        "def score(rollouts):\n    return [float(len(r.token_ids)) for r in rollouts]\n"
    )
    config = RewardConfig(source="my_reward:score")
    reward = build_reward(config, TOKENIZER, expected_length=1.0, separator=",")
    assert reward([ROLLOUT])[0].tolist() == [0.0, 0.0, 0.0, 0.0, 5.0]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("lexicl", 'write "lexical", "model", or module:function'),
        ("no_such_module_here:f", "there is no module 'no_such_module_here'"),
        ("json.no_such_part:f", "there is no module 'json.no_such_part'"),
        ("needs_more:f", "importing 'needs_more' failed with ModuleNotFoundError"),
        ("bad_syntax:f", "importing 'bad_syntax' failed with SyntaxError"),
        ("holds:missing", r"module 'holds' \(.*holds\.py\) has no attribute 'missing'"),
        ("holds:number", "'number' is a int, not a function"),
        ("holds:Scorer", "is a class: name a function"),
    ],
)
def test_a_source_that_cannot_be_used_is_named(folder: Path, source: str, expected: str) -> None:
    (folder / "needs_more.py").write_text("import surely_not_installed\n")
    (folder / "bad_syntax.py").write_text("def f(:\n")
    (folder / "holds.py").write_text("number = 3\n\nclass Scorer:\n    pass\n")
    with pytest.raises(UserError, match=expected) as caught:
        build_reward(RewardConfig(source=source), TOKENIZER, expected_length=1.0, separator=",")
    assert f"reward.source = {source!r}" in str(caught.value)


@pytest.mark.parametrize("spec", ["plain", ":f", "json:"])
def test_load_object_wants_module_and_function(spec: str) -> None:
    with pytest.raises(UserError, match=r"ppo\.loss = .*module:function"):
        load_object(spec, "ppo.loss")


@pytest.mark.usefixtures("folder")
def test_the_current_directory_cannot_shadow_an_installed_package() -> None:
    Path("json.py").write_text("raise RuntimeError\n")
    Path("snowballstemmer.py").write_text("raise RuntimeError\n")
    assert load_object("json:dumps", "reward.source")([1]) == "[1]"
    assert load_object("snowballstemmer:stemmer", "reward.source") is not None


@pytest.mark.parametrize("length", [float("nan"), float("inf"), -1.0])
def test_an_impossible_expected_length_is_refused(length: float) -> None:
    with pytest.raises(UserError, match="expected_length"):
        rewards(expected_length=length)
    assert rewards(expected_length=length, **PLAIN)([ROLLOUT])[0][0] == 1.0


def test_lwp_numbers_of_the_paper() -> None:
    sl = 12
    weights = lwp(torch.tensor([sl, sl + 2, sl + 3, sl + 4]), sl, 2.0)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx([0.9975, 0.881, 0.5, 0.119], abs=5e-4)


@settings(deadline=None)
@given(l=st.integers(1, 10**9), sl=st.floats(0, 1e9), alpha=st.floats(1e-6, 1e9))
def test_lwp_never_overflows_and_never_grows(l: int, sl: float, alpha: float) -> None:  # noqa: E741
    near, far = lwp([l, l + 1], sl, alpha).tolist()
    assert 0.0 <= far <= near <= 1.0


def test_a_person_can_check_the_alignment() -> None:
    reward = rewards(**PLAIN)
    rollouts = [ROLLOUT, response(" lisbon [bold]\u001b\U0001f355", end=False)]
    values, classes = reward.explain(rollouts)
    console = Console(width=120)
    with console.capture() as captured:
        console.print(examples_table(rollouts, classes, values, TOKENIZER, "centred"))
    assert 'reward.scale = "centred" pays -1 if irrelevant, 1 if relevant' in " ".join(captured.get().split())
    lines = captured.get().splitlines()
    row = {key: next(line for line in lines if key in line) for key in ("' lisbon'", "','", "' pasta'", "</s>")}
    assert "relevant" in row["' lisbon'"]
    assert "+1.000" in row["' lisbon'"]
    assert "separator" in row["','"]
    assert "irrelevant" in row["' pasta'"]
    assert "-1.000" in row["' pasta'"]
    assert "separator" in row["</s>"]
    assert any("true next: lisbon hotels" in line for line in lines)
    assert any("\\x1b" in line for line in lines), "control characters are shown, not sent"


def test_the_table_without_labels() -> None:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(examples_table([ROLLOUT], None, rewards(lambda _: [1.5])([ROLLOUT]), TOKENIZER, "paper"))
    assert "+1.500" in captured.get()
    assert "irrelevant" not in captured.get()


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_any_sampled_response_gets_one_finite_reward_per_token(data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, len(TOKENIZER) - 1), min_size=1, max_size=12))
    text = TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    truth = [text[2:8] or "x"]
    prompt = Prompt(token_ids=[1], user_id="u", history=["a"], next_queries=truth, relevant_queries=truth)
    sampled = Rollout(
        prompt=prompt, token_ids=ids, logprobs=[0.0] * len(ids), text=text, finish_reason="length", policy_version=0
    )
    values, classes = rewards(**PLAIN).explain([sampled])
    assert classes is not None
    assert values[0].tolist() == [(0.0, -1.0, 1.0)[c] for c in classes[0]]
    assert LexicalLabeller()(["a"], truth, text).spans or not any(classes[0])
    (strict,) = rewards(reject_copies=True, **PLAIN)([sampled])
    assert set((values[0] - strict).tolist()) <= {0.0, 2.0}
