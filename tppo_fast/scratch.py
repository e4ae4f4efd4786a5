"""Small models that start from nothing, and the tokenizer that fits them: for the demo and for offline reward models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import LlamaConfig, ModernBertConfig, PreTrainedTokenizerFast

MAX_POSITIONS = 512
"""Longest input of a small model, in tokens."""


def byte_bpe(texts: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on ``texts``; it encodes any text, and ends sequences with ``</s>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    plan = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, plan)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )


def llama_config(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> LlamaConfig:
    """A causal decoder of about a million parameters."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=2,
        tie_word_embeddings=True,
        initializer_range=0.05,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        eos_token_id=_id(tokenizer, "</s>"),
        pad_token_id=_id(tokenizer, "<pad>"),
        bos_token_id=None,
        **settings,
    )


def modernbert_config(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> ModernBertConfig:
    """A bidirectional encoder of about half that size, every layer with full attention."""
    from transformers import ModernBertConfig

    eos = _id(tokenizer, "</s>")
    return ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        layer_types=["full_attention"] * 2,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.05,
        eos_token_id=eos,
        sep_token_id=eos,
        cls_token_id=eos,
        bos_token_id=eos,
        pad_token_id=_id(tokenizer, "<pad>"),
        **settings,
    )


def _id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)  # a list only comes back for a list
    return found


def make(model_class: Any, config: Any, seed: int) -> Any:
    """A randomly initialised model, the same for the same seed."""
    torch.manual_seed(seed)
    return model_class(config)


def look_at_equals(encoder: Any, gain: float = 2.0) -> None:
    """Start each head of a new ModernBERT with equal query and key projections: a token then attends most to its like.

    That words repeat is half of what a reward model must see, and a small model is slow to find it out (dev/LOG.md, 2026-11-25).
    After "Mimetic initialization of self-attention layers" (Trockman and Kolter, 2023): trained queries and keys look like this.

    Args:
        encoder: a model that ``make`` made with ``modernbert_config``; changed in place.
        gain: scale of both projections.
    """
    with torch.no_grad():
        for layer in encoder.model.layers:
            query, key, _ = layer.attn.Wqkv.weight.chunk(3)  # views, each [D, D]
            query.mul_(gain)
            key.copy_(query)
