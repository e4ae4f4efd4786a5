"""What a reward model starts from: a transformers backbone of the user's, or a small one made from nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tppo_fast import scratch
from tppo_fast.errors import UserError
from tppo_fast.reward_model.settings import RewardModelConfig
from tppo_fast.rewards.labels import CLASS_NAMES
from tppo_fast.rewards.token_model import Reader, TokenModel, special_tokens

_HEAD = {
    "num_labels": 3,
    "id2label": dict(enumerate(CLASS_NAMES)),
    "label2id": {n: i for i, n in enumerate(CLASS_NAMES)},
}


def build(config: RewardModelConfig, texts: Iterable[str], device: torch.device | str) -> TokenModel:
    """An untrained token classifier on the configured backbone; ``texts`` make the tokenizer of a "scratch" one.

    Raises:
        UserError: the folder holds no usable backbone, its tokenizer has no offsets, or ``data`` writes a special token of it.
    """
    make = _from_nothing if config.backbone.path == "scratch" else _pretrained
    classifier, tokenizer = make(config, texts)
    if not tokenizer.is_fast:
        raise UserError(
            f"backbone.path = {config.backbone.path!r}: its tokenizer gives no character offsets; use a model with a fast one"
        )
    for field in ("template", "separator"):
        text = getattr(config.data, field)
        if written := [token for token in special_tokens(tokenizer).values() if token and token in text]:
            raise UserError(
                f"data.{field} = {text!r} holds {written[0]!r}, a special token of the backbone, which a reward model would read "
                "as plain text: leave it out"
            )
    limit = min(config.data.max_tokens, _positions(classifier), tokenizer.model_max_length)
    data = config.data
    reader = Reader(tokenizer=tokenizer, template=data.template, separator=data.separator, max_tokens=limit)
    return TokenModel(classifier.to(device), reader)


def _positions(classifier: Any) -> int:
    """Longest input that the backbone has positions for. RoBERTa and its kin count from the row after the padding token's."""
    rows = getattr(classifier.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    tables = [module for name, module in classifier.named_modules() if name.endswith("position_embeddings")]
    padding = [table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None]
    return rows - max(padding, default=-1) - 1


def _pretrained(config: RewardModelConfig, texts: Iterable[str]) -> tuple[Any, Any]:
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    from tppo_fast.loading import STRICT, check_vocabulary, complete, in_short

    del texts
    path, trust = config.backbone.path, config.backbone.trust_remote_code
    torch.manual_seed(config.seed)  # of the new head
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
        loaded = AutoModelForTokenClassification.from_pretrained(path, trust_remote_code=trust, **STRICT, **_HEAD)
        body = f"{loaded[0].base_model_prefix}."
        classifier = complete(loaded, is_new=lambda name: not name.startswith(body) or "pooler" in name.split("."))
    except Exception as error:  # transformers raises many kinds for a bad folder
        known = Path(path).is_dir()
        reason = in_short(error) if known else "no such folder, and it cannot be found on a hub"
        raise UserError(f"backbone.path = {path!r}: no token classifier could be made of it ({reason})") from None
    check_vocabulary(f"backbone.path = {path!r}", tokenizer, classifier.get_input_embeddings().num_embeddings)
    return classifier, tokenizer


def _from_nothing(config: RewardModelConfig, texts: Iterable[str]) -> tuple[Any, Any]:
    from transformers import LlamaForTokenClassification, ModernBertForTokenClassification

    tokenizer = scratch.byte_bpe([*texts, *config.data.template.split("{history}")])
    if config.backbone.scratch == "decoder":
        settings = scratch.llama_config(tokenizer, **_HEAD)
        return scratch.make(LlamaForTokenClassification, settings, config.seed), tokenizer
    settings = scratch.modernbert_config(tokenizer, **_HEAD)
    classifier = scratch.make(ModernBertForTokenClassification, settings, config.seed)
    scratch.look_at_equals(classifier)
    return classifier, tokenizer
