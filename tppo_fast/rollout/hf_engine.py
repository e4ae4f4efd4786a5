"""Rollouts by transformers' generate: runs wherever the model runs, exact log-probabilities, no extra dependency.

The samples of one prompt share its prefill, as in the update.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

from tppo_fast.data_types import Prompt, Rollout
from tppo_fast.errors import EngineError
from tppo_fast.rollout.base import SamplingParams, answered, check_lengths, decoder, fitting, loaded, stop_tokens


class _Recorder(LogitsProcessor):
    """Applies the temperature and keeps the log-probability of every token that generate then samples.

    Each call sees the tokens chosen from the scores of the call before, so one step's log-softmax is all that stays alive.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._before: Tensor | None = None  # [B, V]
        self.columns: list[Tensor] = []  # each [B]

    def __call__(self, input_ids: Any, scores: Any) -> Any:  # [B, length], [B, V] -> [B, V]
        self.chosen(input_ids)
        scores = scores.float() / self._temperature
        self._before = logprobs = scores.log_softmax(-1)
        if logprobs[:, 0].isnan().any():  # one NaN or infinite score makes all of its row NaN
            raise EngineError(
                "the policy's next-token scores are not finite: its weights diverged or are damaged; go on from an earlier "
                "checkpoint, with a lower learning rate"
            )
        return scores

    def chosen(self, input_ids: Tensor) -> None:
        if self._before is not None:
            self.columns.append(self._before.gather(-1, input_ids[:, -1:])[:, 0])
            self._before = None


class _Preallocated(DynamicLayer):
    """A layer's keys and values [B, H, length, d], written in place: transformers' own are concatenated anew at every token."""

    def __init__(self, capacity: int) -> None:
        """``capacity``: tokens that a row may reach."""
        super().__init__()
        self._capacity = capacity
        self._room: list[Tensor] = []  # keys and values with room for all tokens

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append; returns all keys and values so far."""
        start = self.get_seq_length()
        if start == 0:
            self.lazy_initialization(key_states, value_states)
            self._room = [x.new_empty((*x.shape[:2], self._capacity, x.shape[3])) for x in (key_states, value_states)]
        end = start + key_states.shape[2]
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start:end] = new
        return self._filled(end)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at ``indices``, which may repeat."""
        self._room = [room[indices] for room in self._room]
        self._filled(self.get_seq_length())

    def _filled(self, length: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (room[:, :, :length] for room in self._room)
        return self.keys, self.values


class HFEngine:
    """Holds its own copy of the policy; ``load_weights`` overwrites it in place."""

    def __init__(self, lm: Any, tokenizer: Any, *, batch_size: int = 256) -> None:
        """``lm`` is a transformers causal LM that this engine may keep for itself; ``batch_size`` bounds one generate call."""
        self._lm: Any = lm.eval().requires_grad_(False)
        self._decode = decoder(tokenizer)
        self._batch_size = batch_size
        self._version: int | None = None
        self._eos = stop_tokens(lm.generation_config, tokenizer)
        layers = DynamicCache(config=lm.config).layers
        self._shares = all(hasattr(x, "batch_select_indices") for x in layers)  # a linear attention's state has no rows
        # the model's own generation settings (top-k, penalties, ...) must not touch the distribution
        lm.generation_config = GenerationConfig(eos_token_id=self._eos, pad_token_id=self._eos[0])

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        version = loaded(self._version)
        longest = max((len(p.token_ids) for p in prompts), default=0) + sampling.max_new_tokens
        check_lengths(longest, self._lm.config)
        rows = [place for place in range(len(prompts)) for _ in range(sampling.n)]
        answers: list[tuple[list[int], list[float]]] = []
        devices = [self._lm.device] if self._lm.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(sampling.seed)
            for start in range(0, len(rows), self._batch_size):
                answers += self._answers(prompts, rows[start : start + self._batch_size], sampling)
        return [
            answered(prompts[row], *answer, decode=self._decode, stop=self._eos, version=version)
            for row, answer in zip(rows, answers, strict=True)
        ]

    def _answers(
        self, prompts: Sequence[Prompt], rows: list[int], sampling: SamplingParams
    ) -> list[tuple[list[int], list[float]]]:
        """(tokens, log-probabilities) for each of ``rows``, ascending places in ``prompts``."""
        ids, mask = self._left_padded([p.token_ids for p in prompts[rows[0] : rows[-1] + 1]])
        places = torch.tensor(rows, device=ids.device) - rows[0]
        cache = self._cache(ids.shape[1] + sampling.max_new_tokens)
        if cache is not None and sampling.n > 1 and ids.shape[1] > 1:
            self._prefill(cache, ids, mask, places)
        ids, mask = ids[places], mask[places]
        recorder = _Recorder(sampling.temperature)
        out = self._lm.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=not sampling.greedy,
            temperature=None if sampling.greedy else 1.0,  # the recorder applies it
            top_k=None if sampling.greedy else 0,
            top_p=None if sampling.greedy else 1.0,
            max_new_tokens=sampling.max_new_tokens,
            logits_processor=LogitsProcessorList([recorder]),
            past_key_values=cache,
        )
        recorder.chosen(out)
        tokens = out[:, ids.shape[1] :].tolist()
        logprobs = torch.stack(recorder.columns, 1).tolist()
        return list(zip(tokens, logprobs, strict=True))

    def _cache(self, capacity: int) -> Cache | None:
        """An empty cache, or None where generate had better make its own."""
        if not self._shares:
            return None
        cache = DynamicCache(config=self._lm.config)
        cache.layers = [_Preallocated(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cache

    def _prefill(self, cache: Cache, ids: Tensor, mask: Tensor, places: Tensor) -> None:
        """Keys and values of every row's prompt but its last token, each prompt read once: generate goes on from there."""
        positions = (mask.cumsum(-1) - 1).clamp_min(0)  # as generate counts them
        before = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        self._lm.base_model(**{k: v[:, :-1] for k, v in before.items()}, past_key_values=cache, use_cache=True)
        cache.batch_select_indices(places)

    def _left_padded(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, sequences))
        ids = torch.full((len(sequences), width), self._eos[0])
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, width - len(sequence) :] = torch.tensor(sequence)
            mask[row, width - len(sequence) :] = 1
        return ids.to(self._lm.device), mask.to(self._lm.device)

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        own = self._lm.state_dict()
        self._version = None  # whatever goes wrong from here on, nothing is sampled from half a policy
        for name, tensor in fitting(weights, {name: tuple(t.shape) for name, t in own.items()}):
            own[name].copy_(tensor)
        self._version = version

    def sleep(self) -> None:
        """The copy stays where it is."""

    def close(self) -> None:
        self._lm = None
