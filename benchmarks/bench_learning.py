"""What a method's samples and seconds buy: ``python -m benchmarks --suite learning``.

TPPO, its clean control (the same token rewards summed onto the last token), sentence-level PPO and GRPO from one supervised
start, on generated sessions, by ``tppo_fast.compare``. The gain to reach was chosen before a run, what it counts from after its
curves were known: first each run's own first evaluation, now the mean of them all. Two seeds: these rows are in no headline.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.results import Options, Outcome, Result, summarise
from tppo_fast import compare
from tppo_fast.experiment_config import Experiment
from tppo_fast.jobs import slug
from tppo_fast.metrics import read_metrics, recorded
from tppo_fast.sections import build_section

GAIN = 0.04
"""Held-out relevance above the start, which is the mean of every run's first evaluation, all of one policy: a single one, of 200
prompts, has a standard error of half this gain."""
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "TPPO": ("tppo", {"ppo": {"gamma": 0.7}}),
    "TPPO's rewards on the last token": ("control", {"ppo": {"gamma": 1.0}}),
    "sentence PPO": ("ppo", {"ppo": {"gamma": 1.0}}),
    "GRPO": ("grpo", {"ppo": {"kl_placement": "loss", "value_warmup_steps": 0}}),
}
"""Name -> (algorithm, its own settings). A reward on every token allows a discount; a single one at the end does not."""
BASELINE = "sentence PPO"


def experiment(options: Options) -> Experiment:
    """The demo's model and settings, two seeds."""
    quick = options.quick
    values: dict[str, Any] = {
        "title": "Samples and seconds to a held-out relevance", "baseline": BASELINE,
        "run_dir": str(options.scratch / ("learning-quick" if quick else "learning")),
        "seeds": [options.seed] if quick else [options.seed, options.seed + 1],
        "sessions": 20 if quick else 300, "responses": 1,
        "start": {
            "sft": {"lr": 3e-3},
            "train": {"steps": 3 if quick else 700, "eval_every": 350, "save_every": 350, "eval_prompts": 100},
        },
        "base": {
            "threads": 1,  # small matrices: a second thread costs more than it brings
            "data": {"synthetic_sessions": 300 if quick else 8000},
            "rollout": {"prompts_per_step": 4 if quick else 32, "samples_per_prompt": 4, "max_new_tokens": 32},
            "reward": {"scale": "binary", "length_penalty": False},
            "ppo": {
                "lr": 5e-4, "critic_lr": 3e-3, "lr_schedule": "linear", "minibatches": 2, "value_clip": None, "kl_coef": 0.02,
                "value_warmup_steps": 0 if quick else 2,
            },
            "train": {
                "steps": 2 if quick else 40, "eval_every": 1 if quick else 5, "eval_prompts": 16 if quick else 200,
                "save_every": 20, "show_examples": 0, "tensorboard": False,
            },
        },
        "methods": [{"name": n, "algorithm": a, "settings": own} for n, (a, own) in METHODS.items()],
    }  # fmt: skip
    return build_section(values, Experiment)


def run(options: Options) -> Outcome:
    """The suite; what an earlier one left in ``options.scratch`` is removed first."""
    setup = experiment(options)
    shutil.rmtree(setup.run_dir, ignore_errors=True)
    verdict = compare.compare(setup)
    curves = {name: [_curve(setup, name, seed) for seed in setup.seeds] for name in METHODS}
    start = statistics.fmean(curve[0][2] for several in curves.values() for curve in several if curve)
    results = [row for name in METHODS for row in _rows(name, curves[name], start)]
    summarise(results)
    settings = {
        "threads": 1,
        "gain": GAIN,
        "start": start,
        "seeds": list(setup.seeds),
        "experiment": setup.model_dump(mode="json"),
    }
    return Outcome(results=results, settings=settings, extra={"curves": curves, "verdict": verdict})


def _curve(setup: Experiment, name: str, seed: int) -> list[list[float]]:
    """[samples, seconds of training, relevance] of each evaluation."""
    per_step = setup.base["rollout"]["prompts_per_step"] * setup.base["rollout"]["samples_per_prompt"]
    rows = read_metrics(setup.run_dir / slug(name) / f"seed-{seed}")
    return [[p.samples, p.seconds, p.value] for p in recorded(rows, "eval/relevance", per_step)]


def _rows(name: str, curves: Sequence[list[list[float]]], start: float) -> list[Result]:
    """Samples and seconds to the gain over ``start``, and what the last evaluation found: a value for each seed."""
    reached = [point for curve in curves for point in [p for p in curve if p[2] >= start + GAIN][:1]]
    last = [curve[-1] for curve in curves if curve]
    common: dict[str, Any] = {"provider": f"tppo_fast: {name}", "baseline": name == BASELINE}
    missed = len(curves) - len(reached)
    why = f"{missed} of {len(curves)} seeds never reached it" if missed else None
    rows = [
        Result(
            case=f"{what} until held-out relevance is {GAIN} above the start",
            unit=unit,
            values=[] if missed else [point[place] for point in reached],
            problem=why,
            **common,
        )
        for place, (what, unit) in enumerate((("responses sampled", "responses"), ("seconds of training", "s")))
    ]
    samples = int(last[0][0]) if last else 0
    final: dict[str, Any] = {"values": [p[2] for p in last], "problem": None if last else "it failed"}
    rows.append(Result(case=f"held-out relevance after {samples:,} responses", unit="relevance", **final, **common))
    return rows
