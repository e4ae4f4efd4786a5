"""The clean control: TPPO's own token rewards, summed onto the last token. Same signal, sparse.

The paper's PPO baseline changes reward model, template and scale together with the placement; against this one only credit
assignment differs.
"""

from __future__ import annotations

from dataclasses import replace

from tppo_fast.algorithms import tppo

ALGORITHM = replace(tppo.ALGORITHM, placement="last")
