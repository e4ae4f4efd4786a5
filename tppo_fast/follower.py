"""A process that shares the leader's run: it does what it is told, one request after another on each of two connections."""

from __future__ import annotations

import os
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tppo_fast import building
from tppo_fast.child import Answer, Operations, done, serve
from tppo_fast.config import build
from tppo_fast.data_types import Prompt, RolloutBatch, TrainBatch
from tppo_fast.ppo import PPO
from tppo_fast.rewards import model_source
from tppo_fast.rollout import RolloutEngine, SamplingParams
from tppo_fast.rollout.base import to_row
from tppo_fast.runs import growing_segments
from tppo_fast.team import Team


class Follower:
    """The parts of a run that every process has."""

    ppo: PPO
    engine: RolloutEngine
    _scorer: model_source.ModelReward
    _prepared: TrainBatch

    def __init__(self, told: dict[str, Any]) -> None:
        """``told``: see ``leader``."""
        self._told = told

    def follow(self, learn: Connection, sample: Connection) -> None:
        """Until the leader is gone, or a request failed."""

        def sampling() -> None:
            try:
                serve(sample, self._sampling())
            finally:
                os._exit(1)  # at once: the other thread may wait in a sum for a leader that is gone

        threading.Thread(target=sampling, daemon=True).start()
        serve(learn, self._learning(), until_failed=True)

    def _learning(self) -> Operations:
        return {
            "build": self._build,
            "join": self._join,
            "make_room": lambda _: done(building.make_room(self.ppo)),
            "unpark": lambda _: done(self.ppo.unpark()),
            "score": self._score,
            "prepare": self._prepare,
            "update": lambda _: done(self.ppo.update(self._prepared)),
        }

    def _sampling(self) -> Operations:
        return {
            "load_weights": self._load_weights,
            "sleep": lambda _: done(self.engine.sleep()),
            "close": lambda _: done(self.engine.close()),
            "generate": self._generate,
        }

    def _build(self, _: dict[str, Any]) -> Answer:
        config = build(self._told["config"])
        growing_segments(config)
        device = building.settle(config)
        if config.reward.source == "model":
            self._scorer = model_source.build(config.reward, device, config.data.separator)
        start_from = self._told["start_from"]
        self.ppo, self.engine, _pending = building.learner_and_engine(
            config,
            *building.models(config, device),
            None if start_from is None else Path(start_from),
            Team(self._told["rank"], config.processes),
        )
        return None, None

    def _join(self, _: dict[str, Any]) -> Answer:
        self.ppo.team.join(self.ppo.device, Path(self._told["meeting"]))
        self.ppo.meet()
        return None, None

    def _score(self, arguments: dict[str, Any]) -> Answer:
        scores = self._scorer.score([(tuple(history), text) for history, text in arguments["contents"]])
        return [score.spans for score in scores], {str(i): score.values.clone() for i, score in enumerate(scores)}

    def _prepare(self, arguments: dict[str, Any]) -> Answer:
        self._prepared, _ = self.ppo.prepare(RolloutBatch(**arguments["tensors"]))
        return None, None

    def _load_weights(self, arguments: dict[str, Any]) -> Answer:
        self.engine.load_weights(self.ppo.model.actor.named_weights(), arguments["version"])
        return None, None

    def _generate(self, arguments: dict[str, Any]) -> Answer:
        prompts = [Prompt(**_tuples(prompt)) for prompt in arguments["prompts"]]
        return [to_row(r) for r in self.engine.generate(prompts, SamplingParams(**arguments["sampling"]))], None


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """The lists, which were tuples before they were JSON, as tuples again."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
