"""The Triton backend: one file per op, made torch ops by ``library``. Importing it touches no device."""

from __future__ import annotations

from ..custom_ops import gae_op, logprobs_op, ppo_op, stats_op, whiten_of
from ..linear_loss import linear_logprobs_op, linear_token_loss_op
from .gae import gae as _gae
from .gae import stats as _stats
from .logprobs import rows
from .ppo_loss import ppo as _ppo

logprobs_from_logits = logprobs_op("triton", rows)
linear_logprobs = linear_logprobs_op("triton", rows)
linear_token_loss = linear_token_loss_op(rows, linear_logprobs)
gae = gae_op("triton", _gae)
whitening_stats = stats_op("triton", _stats)
whiten = whiten_of(whitening_stats)
ppo_loss = ppo_op("triton", _ppo)

__all__ = [
    "gae",
    "linear_logprobs",
    "linear_token_loss",
    "logprobs_from_logits",
    "ppo_loss",
    "rows",
    "whiten",
    "whitening_stats",
]
