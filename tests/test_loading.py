"""What is loaded is what the file holds: no weight is made up, and no token is without a row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers as t
from support import drop_weight, tiny_llama, tokenizer, wide_llama, write_model

from tppo_fast import loading, model, model_folder
from tppo_fast.config import ModelConfig
from tppo_fast.errors import UserError
from tppo_fast.labelling.embedding import SentenceEncoder
from tppo_fast.reward_model import backbone
from tppo_fast.reward_model.settings import RewardModelConfig
from tppo_fast.rewards import token_model
from tppo_fast.sections import build_section


def gpt2(size: int) -> Any:
    return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=size, n_embd=32, n_layer=1, n_head=2, n_positions=256))


def bert(size: int) -> Any:
    """Saved for masked words: without a pooler, which the encoder alone would have."""
    return t.BertForMaskedLM(
        t.BertConfig(
            vocab_size=size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            pad_token_id=0,
        )
    )  # fmt: skip


def build_backbone(path: Path) -> token_model.TokenModel:
    settings = {"data": {"labels": "none.jsonl"}, "backbone": {"path": str(path)}}
    return backbone.build(build_section(settings, RewardModelConfig), [], "cpu")


@pytest.mark.parametrize(
    ("make", "weight"),
    [
        (tiny_llama, "model.layers.0.mlp.up_proj.weight"),
        (tiny_llama, "lm_head.weight"),
        (wide_llama, "model.norm.weight"),  # tied: the head's own weight is in no file
        (gpt2, "transformer.h.0.attn.c_attn.weight"),
    ],
)
def test_a_policy_without_one_of_its_weights(tmp_path: Path, make: Callable[[int], Any], weight: str) -> None:
    write_model(tmp_path, make)
    loading.load_policy(str(tmp_path))
    drop_weight(tmp_path, weight)
    with pytest.raises(UserError, match=f"weight '{weight}' is missing, 1 such in all"):
        loading.load_policy(str(tmp_path))


def test_a_reward_model_is_no_policy(tmp_path: Path) -> None:
    write_model(tmp_path, lambda size: t.LlamaForTokenClassification(tiny_llama(size).config))
    with pytest.raises(UserError, match=r"'lm_head\.weight' is missing"):
        loading.load_policy(str(tmp_path))


def test_a_weight_of_another_shape(tmp_path: Path) -> None:
    write_model(tmp_path, tiny_llama)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "intermediate_size": 48}))
    with pytest.raises(UserError, match=r"has shape \[32, 64\] and config\.json asks for \[32, 48\]"):
        loading.load_policy(str(tmp_path))


def test_only_the_head_of_a_backbone_is_new(tmp_path: Path) -> None:
    for name, make in {"decoder": tiny_llama, "encoder": bert}.items():
        write_model(tmp_path / name, make)
        assert build_backbone(tmp_path / name).classifier.config.num_labels == 3
        weight = "model.norm.weight" if make is tiny_llama else "bert.encoder.layer.0.output.dense.weight"
        drop_weight(tmp_path / name, weight)
        with pytest.raises(UserError, match=rf"backbone\.path = .*'{weight}' is missing"):
            build_backbone(tmp_path / name)


def test_the_head_of_another_task_makes_room(tmp_path: Path) -> None:
    write_model(tmp_path, lambda size: t.LlamaForTokenClassification(tiny_llama(size).config))  # 2 classes
    assert build_backbone(tmp_path).classifier.score.weight.shape == (3, 32)


def test_a_sentence_encoder_needs_every_weight_but_the_pooler(tmp_path: Path) -> None:
    write_model(tmp_path, bert)
    assert SentenceEncoder(tmp_path)(["lisbon"])["lisbon"].shape == (32,)
    drop_weight(tmp_path, "bert.encoder.layer.0.output.dense.weight")
    with pytest.raises(UserError, match=r"--embedding .*'encoder\.layer\.0\.output\.dense\.weight' is missing"):
        SentenceEncoder(tmp_path, setting="--embedding")


def test_a_trained_reward_model_needs_its_head_too(tmp_path: Path) -> None:
    settings = tiny_llama(300).config
    settings.num_labels = 3
    write_model(tmp_path, lambda _: t.LlamaForTokenClassification(settings))
    reader = {"template": "{history}", "separator": ", ", "max_tokens": 100}
    (tmp_path / token_model.RECORD).write_text(json.dumps({"reader": reader}))
    token_model.load(str(tmp_path), "cpu")
    drop_weight(tmp_path, "score.weight")
    with pytest.raises(UserError, match=r"reward\.model = .*'score\.weight' is missing"):
        token_model.load(str(tmp_path), "cpu")


@pytest.mark.parametrize(
    ("load", "field", "make"),
    [
        (lambda path: loading.load_policy(str(path)), "model.path", tiny_llama),
        (build_backbone, "backbone.path", tiny_llama),
        (SentenceEncoder, "--model", bert),
    ],
)
def test_a_tokenizer_with_more_tokens_than_rows(
    tmp_path: Path, load: Callable[[Path], Any], field: str, make: Callable[[int], Any]
) -> None:
    write_model(tmp_path, lambda size: make(size - 7))
    count = len(tokenizer())
    with pytest.raises(UserError, match=f"{field}.*has {count} tokens and its embedding table {count - 7} rows"):
        load(tmp_path)


def test_what_no_run_could_use(tmp_path: Path) -> None:
    def broken(size: int) -> Any:
        lm = tiny_llama(size)
        lm.model.norm.weight.data[3] = float("nan")
        return lm

    write_model(tmp_path / "nan", broken)
    with pytest.raises(UserError, match=r"weight 'model\.norm\.weight' holds NaN or infinity"):
        loading.load_policy(str(tmp_path / "nan"))
    with pytest.raises(UserError, match=r"weight 'model\.norm\.weight' holds NaN or infinity"):
        build_backbone(tmp_path / "nan")
    adapter = peft.get_peft_model(tiny_llama(300), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.save_pretrained(tmp_path / "adapter")
    for setting, path in (("model.path", "adapter"), ("backbone.path", "adapter")):
        with pytest.raises(UserError, match=rf"{setting} = .*: it is an adapter and no whole model: merge it"):
            model_folder.check(str(tmp_path / path), setting)


def test_attention_of_its_own_is_named(tmp_path: Path) -> None:
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "n_positions": 256}
    write_model(tmp_path, lambda size: t.GPTJForCausalLM(t.GPTJConfig(vocab_size=size, **shape)))
    with pytest.raises(UserError, match="attention of its own and cannot be packed: use another model"):
        model.build(ModelConfig(path=str(tmp_path)), "cpu")
