"""The processes that share a run (``processes`` in the config): one per GPU of this machine, or several on its CPU.

Each holds the whole model and the same numbers, samples the responses to its share of the prompts, and reads and backpropagates
its share of the microbatches. Sums over the processes give all of them the one batch's gradient, and all take the same step.

The first process, the leader, is the run: data, rewards, log, checkpoints, signals. The others do what it tells them, see
``leader`` and ``follower``. The sums go by NCCL between GPUs and by gloo on a CPU, in a group of their own: nothing of
``torch.distributed``'s global state is touched, which vLLM uses in the same process.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tppo_fast.data_types import RolloutBatch
from tppo_fast.errors import ProcessFailed, UserError

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)
"""How long a process waits in a sum for the others."""


class Team:
    """A run's processes, as one of them sees them. ``Team()``: it is alone, and sums are what they were."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._group: Any = None
        self._names: list[str] = []  # of the scalars that are summed
        self._failed = False

    def join(self, device: torch.device, meeting: Path) -> None:
        """Form the group; returns when every process has come. ``meeting`` is a file that all can reach."""
        dist: Any = torch.distributed  # as vLLM makes groups; the stubs do not know all of it
        if device.type == "cuda":
            kind, options = dist.ProcessGroupNCCL, dist.ProcessGroupNCCL.Options()
        else:
            kind, options = dist.ProcessGroupGloo, dist.ProcessGroupGloo._Options()
            options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = PATIENCE
        self._group = kind(dist.FileStore(str(meeting), self.size), self.rank, self.size, options)

    def abort(self) -> None:
        """End what the group is at, whatever the others are at; what was being summed is then not to be used."""
        self._failed = True
        if self._group is not None:
            self._group.abort()  # gloo has nothing to end: it notices itself when a process is gone

    def check(self) -> None:
        """Whether all sums so far are sums.

        Raises:
            ProcessFailed: one was aborted.
        """
        if self._failed:
            raise ProcessFailed("another process of the run failed")

    def share(self, groups: Sequence[T]) -> Sequence[T]:
        """This process's part of what all have a list of."""
        return groups[self.rank :: self.size]

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Make each tensor the sum over the processes, the same bits in all of them; the host does not wait for a GPU."""
        if self._group is not None:
            self._reduce(tensors)

    def _reduce(self, tensors: Iterable[Tensor], *options: Any) -> None:
        for work in [self._group.allreduce([tensor], *options) for tensor in tensors]:
            work.wait()

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """``sum_`` of what learns; a parameter that this process did not reach counts as 0."""
        if self._group is None:
            return
        learning = list(parameters)
        for parameter in learning:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype or parameter.dtype)
        self.sum_(p.grad for p in learning if p.grad is not None)

    def sum_scalars(self, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sums over the processes, in fp64.

        Raises:
            UserError: the names are not the same in all of them, or every time.
        """
        if self._group is None:
            return scalars
        names = sorted(scalars)
        if names != self._names:
            self._agree(names, next(iter(scalars.values())).device)
        stacked = on_one_device([scalars[name] for name in names])
        self.sum_([stacked])
        return dict(zip(names, stacked.unbind(), strict=True))

    def _agree(self, names: list[str], device: torch.device) -> None:
        """On the names, once for all."""
        known = self._names or names
        digest = float(int.from_bytes(hashlib.sha256("/".join(names).encode()).digest()[:6], "big"))
        if names != known or self._apart(torch.tensor([digest], dtype=torch.float64, device=device)):
            raise UserError(
                f"ppo.loss returned the metrics {', '.join(names)}, and others before or in another process: with several "
                "processes it must return the same names every time"
            )
        self._names = names

    def sum_numbers(self, numbers: dict[str, float], device: torch.device) -> dict[str, float]:
        """``sum_scalars`` of what the host knows; it waits for the device."""
        if self._group is None:
            return numbers
        sums = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
        self.sum_([sums])
        return dict(zip(numbers, sums.tolist(), strict=True))

    @torch.no_grad()
    def spread(self, parameters: Iterable[Tensor]) -> Tensor:
        """How far the processes' weights are apart, as the largest difference of a parameter's sum; 0 where they are equal."""
        if self._group is None:
            return torch.zeros(())
        return self._apart(torch.stack([p.sum(dtype=torch.float64) for p in parameters]))

    def check_alike(self, spread: float) -> None:
        """Whether the weights are the same in all processes, by their ``spread``.

        Raises:
            ProcessFailed: they are not.
        """
        if spread:
            raise ProcessFailed(
                f"the processes' weights differ (by {spread:.2g} in the sum of a parameter): they must compute alike; use GPUs "
                "of one kind, and the same threads"
            )

    def _apart(self, numbers: Tensor) -> Tensor:
        """The largest difference between the processes' ``numbers``."""
        both = torch.stack([numbers, -numbers])
        options: Any = torch.distributed.AllreduceOptions()
        options.reduceOp = torch.distributed.ReduceOp.MAX
        self._reduce([both], options)
        return both.sum(0).abs().max()

    @contextlib.contextmanager
    def doing(self, operation: str, batch: RolloutBatch | None = None) -> Iterator[None]:
        """The block does ``operation``, which is a sum's other side in every process: the leader tells the others of it."""
        del operation, batch
        yield


def on_one_device(scalars: Sequence[Tensor]) -> Tensor:
    """[len(scalars)] in fp64, where the first is that is on a GPU."""
    device = next((x.device for x in scalars if x.device.type != "cpu"), torch.device("cpu"))
    return torch.stack([x.detach().double().to(device, non_blocking=True) for x in scalars])
