"""What a reward function returned, checked: every message names the function, the rollout and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tppo_fast.data_types import Rollout
from tppo_fast.errors import UserError
from tppo_fast.rewards.labels import Labels
from tppo_fast.rewards.values import ClassProbabilities

_EXPECTED = "one float, one [length] sequence or one Labels per rollout"


def checked_items(output: Any, rollouts: Sequence[Rollout], name: str) -> list[Any]:
    """The output as a list with one item per rollout.

    Raises:
        UserError: not a sequence, or not as many items as rollouts.
    """
    if isinstance(output, (str, bytes)) or not isinstance(output, (Sequence, np.ndarray, torch.Tensor)):
        raise UserError(f"reward {name!r} returned {_kind(output)}, expected {_EXPECTED}")
    if getattr(output, "ndim", 1) == 0:
        raise UserError(f"reward {name!r} returned a single number, expected {_EXPECTED}")
    if len(output) != len(rollouts):
        raise UserError(
            f"reward {name!r} returned {len(output)} items for {len(rollouts)} rollouts, expected {_EXPECTED}"
        )
    return list(output)


def checked_labels(items: list[Any], rollouts: Sequence[Rollout], name: str) -> list[Labels] | None:
    """The items as labels, or None where none of them are.

    Raises:
        UserError: labels for some rollouts only, or a span past the end of the response.
    """
    if not _all_are(Labels, items, name):
        return None
    for index, (labels, rollout) in enumerate(zip(items, rollouts, strict=True)):
        if labels.spans and labels.spans[-1][1] > len(rollout.text):
            raise UserError(
                f"reward {name!r}, rollout {index}: span {labels.spans[-1]} ends past the response's "
                f"{len(rollout.text)} characters, expected spans of Rollout.text"
            )
    return items


def checked_probabilities(items: list[Any], rollouts: Sequence[Rollout], name: str) -> list[ClassProbabilities] | None:
    """The items as class probabilities, or None where none of them are.

    Raises:
        UserError: probabilities for some rollouts only, of the wrong shape, or not finite.
    """
    if not _all_are(ClassProbabilities, items, name):
        return None
    for index, (item, rollout) in enumerate(zip(items, rollouts, strict=True)):
        values, length = item.values, len(rollout.token_ids if item.spans is None else item.spans)
        if tuple(values.shape) != (length, 3) or not torch.isfinite(values).all():
            raise UserError(
                f"reward {name!r}, rollout {index}: class probabilities of shape {list(values.shape)}, expected finite "
                f"ones of shape [{length}, 3]"
            )
    return items


def _all_are(kind: type, items: list[Any], name: str) -> bool:
    """Whether every item is of this kind; some but not all is an error."""
    found = [isinstance(item, kind) for item in items]
    if any(found) and not all(found):
        index = found.index(False)
        raise UserError(
            f"reward {name!r}, rollout {index}: {_kind(items[index])} among {kind.__name__}, expected one kind for all"
        )
    return any(found)


def checked_numbers(items: list[Any], rollouts: Sequence[Rollout], name: str) -> tuple[list[np.ndarray], bool]:
    """The items as fp64 arrays, and whether they are scalars: all 0-d, or all [length].

    Raises:
        UserError: not a number, wrong shape, NaN or infinity (also past fp32), scalars mixed with sequences.
    """
    arrays = [_array(item, index, name) for index, item in enumerate(items)]
    scalar = bool(arrays) and arrays[0].ndim == 0
    for index, (array, rollout) in enumerate(zip(arrays, rollouts, strict=True)):
        where, length = f"reward {name!r}, rollout {index}", len(rollout.token_ids)
        if (array.ndim == 0) != scalar:
            raise UserError(f"{where}: a float and a sequence in one batch, expected one kind for all rollouts")
        if not scalar and array.shape != (length,):
            raise UserError(f"{where}: shape {list(array.shape)}, expected a float or [{length}], one reward per token")
        fine = np.abs(array) <= np.finfo(np.float32).max  # False for NaN too
        if not fine.all():
            place = "" if scalar else f" at token {int(np.argmin(fine))}"
            bad = array.item() if scalar else array[np.argmin(fine)].item()
            raise UserError(f"{where}: reward {bad}{place}, expected a finite number")
    return arrays, scalar


def _array(item: Any, index: int, name: str) -> np.ndarray:
    try:
        if isinstance(item, torch.Tensor) and not item.is_complex():
            return item.detach().to("cpu", torch.float64).numpy()
        array = np.asarray(item)
    except (ValueError, TypeError, RuntimeError):
        array = np.asarray(None)
    if array.dtype.kind not in "biuf":
        raise UserError(f"reward {name!r}, rollout {index}: {_kind(item)}, expected a float or one number per token")
    return array.astype(np.float64)


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
