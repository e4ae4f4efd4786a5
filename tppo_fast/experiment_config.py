"""The settings of ``tppo-fast compare``: methods, seeds, and what all of them share. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from tppo_fast.config import Config
from tppo_fast.finetune_config import DPOConfig, SFTConfig
from tppo_fast.sections import Count, Section, Unit

SET_BY_COMPARE = ("run_dir", "seed", "algorithm")
"""Settings of a job that follow from the experiment's own."""


def _left_to_compare(values: dict[str, Any], where: str) -> dict[str, Any]:
    for name in SET_BY_COMPARE:
        if name in values:
            raise ValueError(f"{where}.{name} = {values[name]!r}: compare sets it for every job; remove it")
    return values


class Method(Section):
    """One row of the table."""

    name: Annotated[str, Field(min_length=1)]
    """How the table and the curves call it."""
    algorithm: Literal["tppo", "control", "ppo", "grpo", "bot-grpo", "dpo"]
    """What it runs; see ``algorithm`` of ``train``, and ``tppo-fast dpo``."""
    settings: dict[str, Any] = Field(default={})
    """Its own settings, laid over those of ``base``: {ppo = {gamma = 0.7}}."""

    @field_validator("settings")
    @classmethod
    def _own_settings(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _left_to_compare(value, "settings")


class Experiment(Section):
    """A run of ``tppo-fast compare``."""

    title: str = "Methods side by side"
    """Heading of the report."""
    run_dir: Path = Path("runs/compare")
    """Where the start, every job and the report go."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(min_length=1)] = (0,)
    """Every method runs once with each; data and starting policy are the same for all."""
    baseline: str = ""
    """The method that the others are measured against. Empty: the first one."""
    at_once: Annotated[int, Field(ge=1, le=1024)] = 1
    """Jobs that run at a time, each in a process of its own if several do: on all GPUs in turn, and on a CPU with as many threads
    as that leaves each. Seconds to the target are then those of a busy machine."""
    target: Unit | None = None
    """Held-out relevance for samples-to-target. None: what the baseline reaches at its end, mean over seeds. Nothing
    is said of one that is not above the start's."""
    sessions: Count = 1000
    """Held-out sessions of the final table."""
    responses: Count = 1
    """Responses to each of them."""
    base: dict[str, Any] = Field(default={})
    """Settings that all methods share: sections data, rollout, reward, ppo, dpo, train, model, as in their own TOML files."""
    start: dict[str, Any] = Field(default={})
    """Of the SFT checkpoint that all methods start from (sft and train sections). Without ``model.path`` a small one is made."""
    methods: Annotated[tuple[Method, ...], Field(min_length=1)]
    """The methods."""

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if twice := [seed for seed in value if value.count(seed) > 1]:
            raise ValueError(f"seeds = {list(value)}: {twice[0]} stands there twice; give each seed once")
        return value

    @field_validator("base")
    @classmethod
    def _known(cls, value: dict[str, Any]) -> dict[str, Any]:
        known = {*Config.model_fields, *SFTConfig.model_fields, *DPOConfig.model_fields} - {*SET_BY_COMPARE}
        if unknown := _left_to_compare(value, "base").keys() - known:
            raise ValueError(f"unknown setting 'base.{min(unknown)}': there are {', '.join(sorted(known))}")
        return value

    @field_validator("start")
    @classmethod
    def _start_settings(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _left_to_compare(value, "start")

    @field_validator("methods")
    @classmethod
    def _distinct(cls, value: tuple[Method, ...]) -> tuple[Method, ...]:
        names = [method.name for method in value]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two methods are called {twice!r}: give each a name of its own")
        return value
