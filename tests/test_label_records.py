"""Responses and labels on disk: read back unchanged in both formats, refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tppo_fast.data.rows import Session
from tppo_fast.errors import UserError
from tppo_fast.labelling import LabelledResponse, read_labels, write_labels
from tppo_fast.labelling.records import Response, read_record, read_responses, write_record, write_responses
from tppo_fast.rewards.labels import Labels

ROW: dict[str, Any] = {
    "user_id": "u17", "history": {"search": ["lisbon"]}, "next_queries": ["lisbon tram map"],
    "response": " lisbon map, rome", "spans": [[1, 7], [8, 11], [11, 12], [13, 17]], "classes": [2, 2, 0, 1],
    "sentence": 1, "labeller": "lexical/0",
}  # fmt: skip
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)


@st.composite
def labelled(draw: st.DrawFn) -> LabelledResponse:
    response = draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
    cuts = sorted(draw(st.sets(st.integers(0, len(response)), max_size=8)))
    spans = list(zip(cuts[::2], cuts[1::2], strict=False))
    classes = draw(st.lists(st.integers(0, 2), min_size=len(spans), max_size=len(spans)))
    return LabelledResponse(
        user_id=draw(NAMES),
        history=draw(st.dictionaries(st.sampled_from(["search", "click"]), st.tuples(NAMES), min_size=1)),
        next_queries=draw(st.lists(NAMES, min_size=1, max_size=3).map(tuple)),
        response=response,
        labels=Labels(spans=spans, classes=classes, sentence=draw(st.integers(0, 1))),
        labeller="lexical/0",
    )


def file_of(folder: Path, **changes: Any) -> Path:
    path = folder / "labels.jsonl"
    row = {name: value for name, value in (ROW | changes).items() if value is not ...}
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(row) + "\n")
    return path


@settings(deadline=None, max_examples=60)
@given(written=st.lists(labelled(), min_size=1, max_size=4))
def test_jsonl_is_read_back(tmp_path_factory: pytest.TempPathFactory, written: list[LabelledResponse]) -> None:
    path = tmp_path_factory.mktemp("labels") / "out.jsonl"
    write_labels(path, written)
    assert read_labels(path) == written


@settings(deadline=None, max_examples=6)
@given(written=st.lists(labelled(), min_size=1, max_size=4))
def test_parquet_is_read_back(tmp_path_factory: pytest.TempPathFactory, written: list[LabelledResponse]) -> None:
    path = tmp_path_factory.mktemp("labels") / "out.parquet"
    write_labels(path, written)
    assert read_labels(path) == written
    before = path.read_bytes()
    write_labels(path, written)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spans": ...}, "line 2: field 'spans' is missing"),
        ({"spam": 1}, "line 2: unknown field 'spam'"),
        ({"classes": [2, 2, 0]}, "line 2: labels have 4 spans and 3 classes"),
        ({"classes": [2, 2, 0, 3]}, "line 2: labels hold class 3"),
        ({"classes": "2201"}, "line 2: classes = '2201'"),
        ({"spans": [[1, 7], [8, 11], [11, 12], [13, 18]]}, "ends after the response"),
        ({"spans": [[1, 7], [6, 11], [11, 12], [13, 17]]}, r"span \(6, 11\): spans must"),
        ({"spans": [[1, 7, 9]] * 4}, "list of \\[start, end\\]"),
        ({"sentence": True}, "sentence = True"),
        ({"sentence": 2}, "sentence = 2"),
        ({"response": None}, "response = None is not text"),
        ({"response": "\ud800" + " " * 20}, "unpaired surrogate"),
        ({"labeller": ""}, "labeller = ''"),
        ({"history": {}}, "history = {} is empty"),
    ],
)
def test_bad_rows(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        read_labels(file_of(tmp_path, **changes))
    assert "\n" not in str(caught.value)
    assert "line 2" in str(caught.value)


def test_nothing_unreadable_is_written(tmp_path: Path) -> None:
    good = read_labels(file_of(tmp_path))[0]
    with pytest.raises(UserError, match="label 1"):
        write_labels(tmp_path / "out.jsonl", [LabelledResponse(**{**_values(good), "response": "short"})])
    with pytest.raises(UserError, match="no labelled response to write"):
        write_labels(tmp_path / "out.jsonl", [])
    assert not (tmp_path / "out.jsonl").exists()


def _values(label: LabelledResponse) -> dict[str, Any]:
    return {name: getattr(label, name) for name in LabelledResponse.__dataclass_fields__}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_responses(tmp_path: Path, suffix: str) -> None:
    sessions = [Session(user_id=u, history={"search": ["a"]}, next_queries=["b"]) for u in ("x", "y")]
    path = tmp_path / f"responses.{suffix}"
    responses = [Response(session=2, user_id="y", text=" one, two"), Response(session=1, user_id="x", text="")]
    write_responses(path, responses)
    assert read_responses(path, sessions) == responses
    with pytest.raises(UserError, match=r"session = 2: give a row of the sessions file, 1 to 1"):
        read_responses(path, sessions[:1])
    with pytest.raises(UserError, match="user_id = 'y', but session 2 is of user 'x'"):
        read_responses(path, sessions[::-1])


def test_the_record_stands_beside_its_file(tmp_path: Path) -> None:
    assert read_record(tmp_path / "labels.jsonl") is None
    write_record(tmp_path / "labels.jsonl", {"labeller": {"id": "lexical/0"}})
    assert read_record(tmp_path / "labels.jsonl") == {"labeller": {"id": "lexical/0"}}
    (tmp_path / "labels.jsonl.record.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read_record(tmp_path / "labels.jsonl")
