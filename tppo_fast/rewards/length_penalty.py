"""The length penalty: past the expected length a response's tokens stop paying."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


def lwp(
    positions: Int[Tensor, "..."] | Float[Tensor, "..."] | Sequence[float] | float, expected_length: float, alpha: float
) -> Float[Tensor, "..."]:
    """``lwp(l) = 1 / (1 + exp(alpha (l - sl) - 6))``, written as a sigmoid so that nothing overflows.

    With alpha = 2: 0.9975 at sl, 0.881 at sl + 2, 0.5 at sl + 3, 0.119 at sl + 4. It multiplies the reward, so with
    centred rewards (-1 / +1) it also takes away the punishment of irrelevant tokens past sl. Source: TPPO (arXiv
    2411.00722), section 3.3: all rewards are positive there, so an undiscounted sum would pay for length.

    Args:
        positions: l, the 1-based position of each token in its response, any shape.
        expected_length: sl in tokens, the median query length times the number of queries.
        alpha: steepness, per token.

    Returns:
        fp32 weights in [0, 1], of the shape of ``positions``.
    """
    distance = torch.as_tensor(positions, dtype=torch.float64) - expected_length
    return torch.sigmoid(6.0 - alpha * distance).float()
