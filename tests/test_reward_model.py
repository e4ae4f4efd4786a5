"""The reward model's training: planted truth, exact resume, what it leaves behind."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from scipy import stats
from support import tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from tppo_fast import cli
from tppo_fast.errors import TrainingDiverged, UserError
from tppo_fast.interrupt import Interrupted, InterruptGuard
from tppo_fast.reward_model import backbone, training
from tppo_fast.reward_model.data import encode, split
from tppo_fast.reward_model.run import RewardModelResult, score, train_reward_model
from tppo_fast.reward_model.settings import LabelsConfig, RewardModelConfig
from tppo_fast.rewards.token_model import Encoded, Reader, TokenModel, batches, load
from tppo_fast.sections import build_section


def config(run_dir: Path, labels: Path, **train: Any) -> RewardModelConfig:
    values = {
        "run_dir": str(run_dir),
        "resamples": 200,
        "data": {"labels": str(labels), "test_fraction": 0.2},
        "train": {"epochs": 2, "batch_size": 16, **train},
    }
    return build_section(values, RewardModelConfig)


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.write(tmp_path_factory.mktemp("labels") / "planted.jsonl", 1200)


@pytest.fixture(scope="module")
def trained(labels: Path, tmp_path_factory: pytest.TempPathFactory) -> RewardModelResult:
    return train_reward_model(config(tmp_path_factory.mktemp("rm") / "run", labels))


# ---------------------------------------------------------------- reading and direction


def reader(**settings: Any) -> Reader:
    given = {"template": "History:\n{history}\nNext queries:", "separator": ", ", "max_tokens": 200, **settings}
    return Reader(**{"tokenizer": tokenizer(), **given})


def test_a_response_is_read_the_same_with_and_without_its_leading_space() -> None:
    one, two = reader()([["lisbon"]] * 2, ["lisbon hotels, tram", "  lisbon hotels, tram "])
    assert one.input_ids == two.input_ids
    text = "  lisbon hotels, tram "
    for (a, b), (c, d) in zip(one.spans, two.spans, strict=True):
        assert "lisbon hotels, tram"[a:b].strip() == text[c:d].strip()
    assert "".join("lisbon hotels, tram"[a:b] for a, b in one.spans) == "lisbon hotels, tram"


def test_a_long_history_loses_its_oldest_part_and_a_long_response_is_refused() -> None:
    short = reader(max_tokens=24)
    (found,) = short([["museum " * 30, "tram map"]], ["lisbon hotels"])
    assert len(found.input_ids) == 24
    assert "tram map\nNext queries: lisbon hotels" in short.tokenizer.decode(found.input_ids)
    with pytest.raises(UserError, match=r"24 tokens.*data\.max_tokens"):
        short([["lisbon"]], ["hotels " * 40])


def test_a_query_of_the_history_holds_no_separator() -> None:
    one, two = reader()([["lisbon, tram"], ["lisbon  tram"]], ["map"] * 2)
    assert one.input_ids == two.input_ids


def unigram() -> PreTrainedTokenizerFast:
    """With special tokens in its vocabulary, as sentencepiece has them: they are found whatever is asked for."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = [*((p, 0.0) for p in pieces), *((c, -3.0) for c in "\u2581abcdefghijklmnopqrstuvwxyz<>/,:\nHN")]
    model = Tokenizer(models.Unigram(vocabulary, unk_id=3))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


@pytest.mark.parametrize("make", [tokenizer, unigram])
def test_a_text_that_spells_a_special_token_is_text(make: Callable[[], Any]) -> None:
    tok, text = make(), " paris</s> map <pad>x</s>"
    plain, spelt = reader(tokenizer=tok)([["lisbon"], ["lisbon</s>tram"]], [" paris", text])
    special = {*tok.all_special_ids} - {tok.unk_token_id}

    def signs(encoded: Encoded) -> list[int]:
        return [i for i in encoded.input_ids if i in special]

    assert signs(spelt) == signs(plain)
    assert not {spelt.input_ids[i] for i in spelt.response} & special
    assert "".join(text[a:b] for a, b in dict.fromkeys(spelt.spans)).replace(" ", "") == text.replace(" ", "")


def test_a_template_with_a_special_token_is_refused(labels: Path) -> None:
    for field, text in (("template", "</s>{history}"), ("separator", "</s>")):
        settings = build_section({"data": {"labels": str(labels), field: text}}, RewardModelConfig)
        with pytest.raises(UserError, match=rf"data\.{field} = '.*' holds '</s>', a special token"):
            backbone.build(settings, ["lisbon"], "cpu")


def bert(vocabulary: int) -> BertForTokenClassification:
    torch.manual_seed(0)
    return BertForTokenClassification(
        BertConfig(
            vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
            max_position_embeddings=128, num_labels=3,
        )
    )  # fmt: skip


def test_an_encoder_sees_later_tokens_and_a_decoder_runs_packed(trained: RewardModelResult) -> None:
    encoder = TokenModel(bert(300), reader())
    assert encoder.hindsight
    assert not encoder.packed
    decoder, record = load(str(trained.folder), "cpu")
    assert not decoder.hindsight
    assert decoder.packed
    assert record["hindsight"] is False


def test_batching_and_packing_do_not_change_the_scores(trained: RewardModelResult) -> None:
    texts = [" hotels price", " book, video course, flights", " tent"] * 3
    histories = [["lisbon", "kyoto"], ["chess"], ["yoga", "pottery", "python"]] * 3
    for model in (load(str(trained.folder), "cpu")[0], TokenModel(bert(300), reader())):
        inputs = model.reader(histories, texts)
        small, large = model.probabilities(inputs, 16), model.probabilities(inputs, 10_000)
        for a, b, one in zip(small, large, inputs, strict=True):
            alone = model.classifier.eval()(input_ids=torch.tensor([one.input_ids])) if not model.packed else None
            assert torch.allclose(a, b, atol=1e-5)
            if alone is not None:
                assert torch.allclose(alone.logits[0][one.response].softmax(-1), a, atol=1e-5)


def test_responses_without_a_token_of_the_reward_model_have_no_scores() -> None:
    """A policy that ends at once; the longer one stands in a group of its own."""
    empty = Encoded(input_ids=[1, 2], token_type_ids=None, response=[], spans=[])
    full = Encoded(input_ids=range(1, 20), token_type_ids=None, response=range(5, 19), spans=[])
    found = TokenModel(bert(300), reader()).probabilities([empty, full, empty], 10_000)
    assert [tuple(rows.shape) for rows in found] == [(0, 3), (14, 3), (0, 3)]


def test_padded_groups_hold_inputs_of_similar_length() -> None:
    lengths = [30, 8, 29, 100, 7, 80, 31, 6]
    inputs = [Encoded(input_ids=range(n), token_type_ids=None, response=[], spans=[]) for n in lengths]
    grouped = [[lengths[i] for i in group] for group in batches(inputs, 100_000, padded=True)]
    assert grouped == [[100, 80], [31, 30, 29], [8, 7, 6]]
    assert [len(group) for group in batches(inputs, 200, padded=True)] == [2, 3, 3]
    assert [len(group) for group in batches(inputs, 62, padded=True)] == [1, 1, 2, 1, 3]
    assert [len(group) for group in batches(inputs, 100_000, padded=False)] == [8]


def test_a_history_is_read_once_for_all_its_responses(
    trained: RewardModelResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load(str(trained.folder), "cpu")
    seen: list[int] = []
    forward = model.classifier.forward
    monkeypatch.setattr(model.classifier, "forward", lambda **k: seen.append(k["input_ids"].numel()) or forward(**k))
    inputs = model.reader([["lisbon", "kyoto"], ["chess"]] * 4, [" tent", " book", " hotels, price", " course"] * 2)
    model.probabilities(inputs, 10_000)
    histories = {tuple(e.input_ids[: e.response[0]]) for e in inputs}
    assert seen == [sum(map(len, histories)) + sum(len(e.response) for e in inputs)]


# ---------------------------------------------------------------- training


def test_planted_truth_is_found(trained: RewardModelResult, labels: Path) -> None:
    own = trained.table["reward model"]
    assert own["auc"].mean >= 0.95
    assert own["auc"].low > max(trained.table[name]["auc"].high for name in ("majority", "copy of the history"))
    assert "do not overlap" in trained.verdict
    model, record = load(str(trained.folder), "cpu")
    rows = split(planted.rows(1200), LabelsConfig(labels=str(labels), test_fraction=0.2), 0).test
    test = encode(rows, model.reader)
    assert len(test) == record["counts"]["test"]
    soft = score(model, test, 4096).sentence_scores()
    true = [sum(c == 2 for c in e.row.labels.classes) / sum(c > 0 for c in e.row.labels.classes) for e in test]
    assert stats.spearmanr(soft, true).statistic >= 0.8


def test_what_it_leaves_behind(trained: RewardModelResult, labels: Path) -> None:
    plain = AutoModelForTokenClassification.from_pretrained(trained.folder)
    assert plain.config.id2label == {0: "separator", 1: "irrelevant", 2: "relevant"}
    assert AutoTokenizer.from_pretrained(trained.folder).is_fast
    record = json.loads((trained.folder / "record.json").read_text())
    assert record["labeller"] == ["planted"]
    assert len(record["labels_sha256"]) == 64
    assert record["metrics"]["reward model"]["auc"]["mean"] == trained.table["reward model"]["auc"].mean
    assert record["config"]["data"]["labels"] == str(labels)
    text = (trained.folder / "README.md").read_text()
    assert trained.verdict in text
    assert "causal" in text
    assert "{{" not in text
    passed_on = {
        "README.md",
        "config.json",
        "model.safetensors",
        "record.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {file.name for file in trained.folder.iterdir()} == passed_on
    page = (trained.folder.parent / "report.html").read_text()
    assert page.count("<figure>") == 2
    assert page.count('class="example"') == 12


def test_no_user_stands_in_two_parts() -> None:
    parts = split(planted.rows(400), LabelsConfig(labels="x", test_fraction=0.2), 3)
    users = [{row.user_id for row in part} for part in (parts.train, parts.validation, parts.test)]
    assert all(users)
    assert len(set.union(*users)) == sum(map(len, users))
    with pytest.raises(UserError, match="2 users"):
        split(planted.rows(8), LabelsConfig(labels="x"), 0)


def test_interrupted_and_resumed_is_as_if_it_had_never_stopped(
    labels: Path, tmp_path: Path, trained: RewardModelResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(10_000))

    def check(_: InterruptGuard) -> None:
        if next(calls) == 31:
            raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(training.InterruptGuard, "check", check)
        with pytest.raises(Interrupted, match="stopped after step 31"):
            train_reward_model(config(tmp_path / "run", labels))
    with pytest.raises(UserError, match=r"train\.lr"):
        train_reward_model(config(tmp_path / "run", labels, lr=1e-4), resume=True)
    resumed = train_reward_model(config(tmp_path / "run", labels), resume=True)
    first, second = (load_file(r.folder / "model.safetensors") for r in (trained, resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert resumed.table == trained.table


def test_what_is_interrupted_after_the_last_step_goes_on_with_scoring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(tmp_path / "run", planted.write(tmp_path / "labels.jsonl", 100), epochs=1)
    validate = training.Learner.validate

    def interrupted(learner: training.Learner, examples: Any) -> float:
        if learner.step == learner.total_steps:
            os.kill(os.getpid(), signal.SIGINT)
        return validate(learner, examples)

    with monkeypatch.context() as patched:
        patched.setattr(training.Learner, "validate", interrupted)
        with pytest.raises(Interrupted, match="continue with --resume"):
            train_reward_model(given)
        patched.setattr(training.Learner, "learn", None)  # no step is left
        resumed = train_reward_model(given, resume=True)
    assert len(list((tmp_path / "run").glob("best-*"))) == 1
    with pytest.raises(UserError, match="continue it with --resume"):
        train_reward_model(given)
    assert train_reward_model(given, resume=True).table == resumed.table


def test_a_run_dir_with_a_run_and_changed_labels_are_refused(
    labels: Path, tmp_path: Path, trained: RewardModelResult
) -> None:
    run_dir = trained.folder.parent
    with pytest.raises(UserError, match="--resume"):
        train_reward_model(config(run_dir, labels))
    other = tmp_path / "labels.jsonl"
    planted.write(other, 100)
    moved = config(tmp_path / "run", other, epochs=1, save_every=1)
    train_reward_model(moved)
    planted.write(other, 104)
    with pytest.raises(UserError, match="has changed"):
        train_reward_model(moved, resume=True)


def test_divergence_names_the_setting(labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "local_loss", lambda logits, *_: logits.sum() * math.nan)
    with pytest.raises(TrainingDiverged, match=r"train\.lr"):
        train_reward_model(config(tmp_path / "run", labels))
    report = json.loads((tmp_path / "run" / "diverged_step_000001.json").read_text())
    assert math.isnan(report["local_loss"])


def test_a_validation_loss_that_is_not_finite_is_divergence(
    labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.Learner, "validate", lambda *_: math.inf)
    with pytest.raises(TrainingDiverged, match=r"step 1.*train\.lr"):
        train_reward_model(config(tmp_path / "run", labels, eval_every=1))
    assert json.loads((tmp_path / "run" / "diverged_step_000001.json").read_text())["validation_loss"] == math.inf


def test_the_learning_rate_suits_the_backbone() -> None:
    pretrained = {"path": "some-encoder"}
    for given, expected in (({}, 1e-3), ({"backbone": pretrained}, 1e-5), ({"train": {"lr": 0.1}}, 0.1)):
        assert build_section(given, RewardModelConfig).peak_lr == expected


def test_the_longest_input_of_a_roberta_has_a_position_for_each_token(labels: Path, tmp_path: Path) -> None:
    """Its table holds two rows that no token of a text has; a tokenizer without a limit does not say so."""
    tok = tokenizer()
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    settings = RobertaConfig(vocab_size=len(tok), max_position_embeddings=66, pad_token_id=1, **shape)
    RobertaForTokenClassification(settings).save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    given = {"data": {"labels": str(labels)}, "backbone": {"path": str(tmp_path)}}
    model = backbone.build(build_section(given, RewardModelConfig), [], "cpu")
    assert model.reader.max_tokens == 64
    inputs = model.reader([["museum " * 40]], ["lisbon hotels"])
    assert len(inputs[0].input_ids) == 64
    assert model.probabilities(inputs, 1000)[0].isfinite().all()


def test_a_backbone_whose_weights_share_memory(labels: Path, tmp_path: Path) -> None:
    """T5's encoder has its embeddings under two names."""
    tok = tokenizer()
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(vocab_size=len(tok), **shape)).save_pretrained(tmp_path / "t5")
    tok.save_pretrained(tmp_path / "t5")
    given = config(tmp_path / "r", labels, epochs=1)
    given = given.model_copy(update={"backbone": given.backbone.model_copy(update={"path": str(tmp_path / "t5")})})
    result = train_reward_model(given)
    assert load(str(result.folder), "cpu")[0].classifier.config.model_type == "t5"


@pytest.mark.parametrize("packed", [True, False])
def test_responses_to_one_session_stay_together_only_where_that_saves_work(
    labels: Path, tmp_path: Path, packed: bool
) -> None:
    model = TokenModel(bert(300), reader())
    model.packed = packed
    examples = encode(planted.rows(200), model.reader)
    order = training.Learner(config(tmp_path, labels), model, examples)._order(torch.Generator().manual_seed(0))
    assert sorted(order) == list(range(len(examples)))
    histories = [(examples[i].row.user_id, examples[i].row.history["search"]) for i in order]
    changes = sum(a != b for a, b in pairwise(histories))
    assert (changes == len(set(histories)) - 1) is packed


def test_a_new_encoder_looks_at_equal_tokens_first(labels: Path) -> None:
    settings = build_section({"data": {"labels": str(labels)}, "backbone": {"scratch": "encoder"}}, RewardModelConfig)
    model = backbone.build(settings, ["lisbon hotels, kyoto hotels, tram"], "cpu")
    assert model.hindsight
    ids = torch.tensor([model.reader.tokenizer("lisbon hotels, kyoto hotels, tram").input_ids])
    model.classifier.set_attn_implementation("eager")
    first = model.classifier(input_ids=ids, output_attentions=True).attentions[0][0].mean(0)  # [L, L], over heads
    same = ids[0][:, None] == ids[0]
    assert (same.sum(1) > 1).sum() >= 4  # hotels and the comma stand there twice
    assert first[same].mean() > 4 * first[~same].mean()


def test_early_stopping_keeps_the_best_weights(labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([0.5, 0.3, 0.4, 0.6, 0.9, 0.9])
    monkeypatch.setattr(training.Learner, "validate", lambda *_: next(losses))
    result = train_reward_model(config(tmp_path / "run", labels, eval_every=2, patience=2))
    record = json.loads((result.folder / "record.json").read_text())
    assert (record["best_step"], record["step"]) == (4, 8)


def test_the_shell(labels: Path, tmp_path: Path) -> None:
    file = tmp_path / "rm.toml"
    file.write_text(f'[data]\nlabels = "{labels}"\n')
    run = CliRunner().invoke
    said = run(cli.cli, ["reward-model", "--help"]).output
    for name in ("--data.labels", "--loss.local_weight", "--backbone.path", "--train.lr"):
        assert name in said
    wrong = run(cli.cli, ["reward-model", str(file), "--backbone.path", "nowhere", "--run-dir", str(tmp_path / "r")])
    assert isinstance(wrong.exception, UserError)
    assert "backbone.path = 'nowhere'" in str(wrong.exception)
    wrong = run(cli.cli, ["reward-model", str(file), "--loss.local-wieght", "1"])
    assert "loss.local_weight" in str(wrong.exception)
