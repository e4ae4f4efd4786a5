"""Rollouts for each step: sampled when asked for, or one step ahead while the trainer updates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from torch import Tensor

from tppo_fast.clock import Clock
from tppo_fast.data_types import Prompt, Rollout
from tppo_fast.rollout import RolloutEngine, SamplingParams
from tppo_fast.rollout.base import to_row

Ask = Callable[[int], tuple[Sequence[Prompt], SamplingParams]]
"""step -> what to sample in it, a function of the step alone."""


class RolloutSource:
    """``staleness`` 0: each step is sampled by the policy it trains. 1: step k + 1 is sampled by the policy of step k,
    at the same time as that one's update; never by an older one. The first step of a run is always fresh.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        weights: Callable[[], Iterable[tuple[str, Tensor]]],
        ask: Ask,
        *,
        staleness: int,
        last_step: int,
    ) -> None:
        self._engine, self._weights, self._ask = engine, weights, ask
        self._staleness, self._last = staleness, last_step
        self._rollouts: dict[int, Future[tuple[list[Rollout], float]]] = {}  # with the seconds that they took
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rollout")

    def take(self, step: int, clock: Clock) -> list[Rollout]:
        """The rollouts to train on in ``step``; with staleness 1, those of the next step start to be sampled."""
        self._rollouts = {s: r for s, r in self._rollouts.items() if s >= step}
        published = step not in self._rollouts
        if published:
            with clock("sync"):
                self._engine.load_weights(self._weights(), version=step)
            self._start(step)
        with clock("rollout_wait"):
            rollouts, seconds = self._rollouts[step].result()
        clock.add("rollout", seconds)
        if self._staleness and step + 1 < self._last and step + 1 not in self._rollouts:
            if not published:
                with clock("sync"):
                    self._engine.load_weights(self._weights(), version=step)
            self._start(step + 1)
        return rollouts

    def _start(self, step: int) -> None:
        self._rollouts[step] = self._pool.submit(self._sampled, *self._ask(step))

    def _sampled(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> tuple[list[Rollout], float]:
        began = time.perf_counter()
        rollouts = self._engine.generate(prompts, sampling)
        return rollouts, time.perf_counter() - began

    def settle(self) -> None:
        """Wait until the engine is free for something else; what failed meanwhile is raised by ``take``."""
        wait(self._rollouts.values())

    def state(self, step: int) -> dict[str, Any] | None:
        """What a resumed run needs to train ``step`` on the same rollouts, as JSON values; None: it samples them itself."""
        if not self._staleness or step not in self._rollouts or self._rollouts[step].exception() is not None:
            return None
        rollouts, seconds = self._rollouts[step].result()
        return {"step": step, "seconds": seconds, "rollouts": [to_row(r) for r in rollouts]}

    def load_state(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        prompts, sampling = self._ask(state["step"])
        repeated = [p for p in prompts for _ in range(sampling.n)]
        ready: Future[tuple[list[Rollout], float]] = Future()
        rollouts = [Rollout(prompt=p, **row) for p, row in zip(repeated, state["rollouts"], strict=True)]
        ready.set_result((rollouts, state["seconds"]))
        self._rollouts[state["step"]] = ready

    def close(self) -> None:
        """Wait for what is being sampled, so that the engine can be closed."""
        self._pool.shutdown(wait=True, cancel_futures=True)
