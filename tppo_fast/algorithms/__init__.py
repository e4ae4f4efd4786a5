"""What tells the methods apart: which reward they read, whether they keep a critic, how rewards become advantages.

Everything else (packing, rollout engines, ops, KL, clipping, loop) is the same code for all. ``algorithm`` in the config:

| name | reward of a response | critic | advantages |
|---|---|---|---|
| tppo | one for every token | yes | GAE over tokens |
| control | the same token rewards, summed onto the last token | yes | GAE over tokens |
| ppo | one sentence score on the last token | yes | GAE over tokens |
| grpo | one sentence score | no | (R - mean of the group) / std of the group, for all its tokens |
| bot-grpo | one for every token | no | (r_t - mean of the group's tokens) / std of the group's tokens |

A group is the responses to one prompt.
"""

from __future__ import annotations

from tppo_fast.algorithms import bot_grpo, control, grpo, ppo, tppo
from tppo_fast.algorithms.base import Algorithm

__all__ = ["ALGORITHMS", "Algorithm"]

ALGORITHMS: dict[str, Algorithm] = {
    "tppo": tppo.ALGORITHM,
    "control": control.ALGORITHM,
    "ppo": ppo.ALGORITHM,
    "grpo": grpo.ALGORITHM,
    "bot-grpo": bot_grpo.ALGORITHM,
}
"""Name in the config -> what it does."""
