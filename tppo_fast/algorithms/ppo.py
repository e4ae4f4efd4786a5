"""Sentence-level PPO, as RLHF has it (arXiv 1909.08593): one score of the whole response, on its last token.

The score is the sentence judgement of whoever labels (``Labels.sentence``), or the one number a reward function gives.
"""

from __future__ import annotations

from dataclasses import replace

from tppo_fast.algorithms import tppo

ALGORITHM = replace(tppo.ALGORITHM, placement="sentence")
