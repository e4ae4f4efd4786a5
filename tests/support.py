"""Makers shared by the tests."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tppo_fast.config import ModelConfig
from tppo_fast.data_types import Prompt, Rollout
from tppo_fast.model import Actor, ActorCritic, Critic

CORPUS = [
    "lisbon hotels, lisbon tram map, cheap flights to lisbon",
    "pasta recipes, History:\n Next queries: camera reviews",
]
EOS = 0


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with 300 tokens; id 0 is the end of sequence."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS * 8,
        trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="</s>", pad_token="</s>", clean_up_tokenization_spaces=False
    )


def tiny_llama(vocab_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=EOS, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def wide_llama(vocab_size: int, *, tied: bool = True) -> LlamaForCausalLM:
    """Heads of 32, as vLLM's CPU backend needs, and weights large enough that log-probabilities depend on them."""
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=EOS, bos_token_id=None, pad_token_id=None,
        tie_word_embeddings=tied, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def no_vllm() -> str | None:
    """Why vLLM cannot be tested here, or None."""
    return None if importlib.util.find_spec("vllm") else "vLLM is not installed (make vllm)"


def hide_vllm_from_trl() -> None:
    """TRL 1.12 imports names that vLLM 0.32 no longer has, wherever vLLM is installed; what it is compared on needs no vLLM."""
    from trl import import_utils

    import_utils.is_vllm_available = lambda *_, **__: False


def write_model(folder: Path, make: Callable[[int], Any]) -> None:
    tok = tokenizer()
    make(len(tok)).save_pretrained(folder)
    tok.save_pretrained(folder)


def drop_weight(folder: Path, name: str) -> None:
    """Take one weight out of a model's file."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})


def actor_critic(make: Callable[[int], Any] = tiny_llama, vocab_size: int = 300, **settings: Any) -> ActorCritic:
    """An actor and a critic in memory, reading packed batches; the value head is random so that values differ."""
    lm = make(vocab_size).eval()
    config = ModelConfig(path="memory", **settings)
    actor = Actor(lm, config)
    critic = Critic(actor, config)
    torch.nn.init.normal_(critic.value_head.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    return ActorCritic(actor, critic)


def prompt(token_ids: Sequence[int], user: str = "u") -> Prompt:
    return Prompt(token_ids=list(token_ids), user_id=user, history=("a",), next_queries=("b",), relevant_queries=("b",))


def rollout(
    p: Prompt, token_ids: Sequence[int], logprobs: Sequence[float] | None = None, finish: str = "stop"
) -> Rollout:
    given = [-1.0] * len(token_ids) if logprobs is None else list(logprobs)
    return Rollout(prompt=p, token_ids=list(token_ids), logprobs=given, text="", finish_reason=finish, policy_version=0)  # type: ignore[arg-type]


def random_rollouts(lengths: Sequence[tuple[int, int]], n: int = 1, vocab: int = 300, seed: int = 0) -> list[Rollout]:
    """Rollouts with the given (prompt, response) lengths, ``n`` per prompt."""
    g = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(1, vocab, (length,), generator=g).tolist()

    prompts = [prompt(ids(p)) for p, _ in lengths]
    return [rollout(p, ids(r)) for p, (_, r) in zip(prompts, lengths, strict=True) for _ in range(n)]


def letter_by_letter(given: Rollout, tok: PreTrainedTokenizerFast) -> Rollout:
    """The same text and end of sequence, sampled in tokens of one byte."""
    letters = [letter for token in tok.convert_ids_to_tokens(given.token_ids[:-1]) for letter in token]
    ids = [*tok.convert_tokens_to_ids(letters), given.token_ids[-1]]
    return replace(given, token_ids=ids, logprobs=[0.0] * len(ids))
