"""Agreement of two labellers: counts and kappa by hand, intervals over users, files that do not match."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats

from tppo_fast import cli
from tppo_fast.errors import UserError
from tppo_fast.labelling import LabelledResponse, write_labels
from tppo_fast.labelling.agreement import compare
from tppo_fast.rewards.labels import Labels


def labelled(
    classes: str, sentence: int, user: str = "u", response: str = "a b c d", who: str = "x"
) -> LabelledResponse:
    spans = [(2 * n, 2 * n + 1) for n in range(len(classes))]
    return LabelledResponse(
        user_id=user,
        history={"search": ("h",)},
        next_queries=("n",),
        response=response,
        labels=Labels(spans=spans, classes=[int(c) for c in classes], sentence=sentence),
        labeller=who,
    )


def test_shares_and_kappa_by_hand() -> None:
    """8 words: both relevant 3, both irrelevant 2, A alone 2, B alone 1; p_o = 5/8, p_e = (5 * 4 + 3 * 4) / 64 = 1/2."""
    a = [labelled("2222", 1, "u"), labelled("2111", 0, "v")]
    b = [labelled("2211", 1, "u", who="y"), labelled("2112", 0, "v", who="y")]
    word, sentence = (found := compare(a, b)).levels
    assert (word.count, word.agreement.mean, word.relevant) == (8, 5 / 8, (5 / 8, 4 / 8))
    assert word.kappa.mean == pytest.approx((5 / 8 - 1 / 2) / (1 - 1 / 2))
    assert (sentence.count, sentence.agreement.mean, sentence.kappa.mean) == (2, 1.0, 1.0)
    assert (found.labellers, found.users, found.only) == (("x", "y"), 2, (0, 0))


def test_separators_and_words_that_only_one_cut_do_not_count() -> None:
    a = [labelled("2021", 1)]
    two = Labels(spans=[(0, 3), (6, 7)], classes=[2, 1], sentence=1)  # one wide word over "a b", none at "c"
    b = [replace(a[0], labels=two, labeller="y")]
    word = compare(a, b).levels[0]
    assert (word.count, word.agreement.mean) == (2, 1.0)
    assert compare(a, b).dropped == 1


def test_a_response_that_one_file_labels_twice_is_refused() -> None:
    a = [labelled("2222", 1), labelled("2222", 1)]  # sampled twice and labelled alike
    other = [labelled("2211", 1, who="y")]
    assert compare(a, other).responses == 1
    with pytest.raises(UserError, match="'a b c d' of user 'u' is labelled twice in one file, by x and y"):
        compare([*a, *other], other)


def test_intervals_resample_users_whole() -> None:
    """One user whose many responses all disagree: a bootstrap over responses would be far too sure."""
    rng = np.random.default_rng(0)
    a = [labelled("1", int(n % 2), user=f"u{n % 5}", response=f"r{n}") for n in range(400)]
    b = [
        labelled("1", 1 - x.labels.sentence if x.user_id == "u0" else x.labels.sentence, x.user_id, x.response)
        for x in a
    ]
    sentence = compare(a, b).levels[1]
    assert sentence.agreement.mean == pytest.approx(0.8)
    half = 0.2 * stats.t.ppf(0.975, 4)  # of the shares 0, 1, 1, 1, 1
    assert (sentence.agreement.low, sentence.agreement.high) == pytest.approx((0.8 - half, 0.8 + half))
    order = rng.permutation(400)
    again = compare([a[i] for i in order], [b[i] for i in order]).levels[1]
    assert again == sentence  # neither order nor chance changes the figures


def test_a_labeller_that_never_varies_has_a_kappa_of_0_and_two_alike_have_none() -> None:
    assert compare([labelled("22", 1)], [labelled("21", 0, who="y")]).levels[0].kappa.mean == 0.0
    a, b = [labelled("22", 1), labelled("22", 1, "v")], [labelled("22", 1), labelled("22", 1, "v")]
    found = compare(a, b)
    assert math.isnan(found.levels[0].kappa.mean)
    assert found.as_json()["word"]["kappa"] == {"value": None, "low": None, "high": None}
    assert math.isnan(compare(a[:1], b[:1]).levels[0].agreement.low)  # one user has no spread


def test_files_without_a_common_response() -> None:
    with pytest.raises(UserError, match="no response is in both"):
        compare([labelled("2", 1)], [labelled("2", 1, response="e")])


def test_from_the_shell(tmp_path: Path) -> None:
    a, b, out = tmp_path / "a.jsonl", tmp_path / "b.parquet", tmp_path / "agreement.json"
    write_labels(a, [labelled("2211", 1, "u"), labelled("2111", 0, "v"), labelled("22", 1, "w", response="a b")])
    write_labels(b, [labelled("2211", 1, "u", who="[/y]"), labelled("2112", 1, "v", who="[/y]")])
    done = CliRunner().invoke(cli.cli, ["label", "--agreement", str(a), str(b), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "91.18%" in done.output  # the paper's row, marked as such
    assert "80.95%" in done.output
    assert "B = [/y]" in done.output  # no markup
    figures = json.loads(out.read_text())
    assert figures["word"]["agreement"]["value"] == 7 / 8
    assert figures["only_in_one"] == [1, 0]
    kept = a.read_bytes()
    for wrong in (a, tmp_path / "absent" / "agreement.json"):
        done = CliRunner().invoke(cli.cli, ["label", "--agreement", str(a), str(b), "--out", str(wrong)])
        assert isinstance(done.exception, UserError)
        assert "give a name ending in .json, in a folder that exists" in str(done.exception)
    assert a.read_bytes() == kept
