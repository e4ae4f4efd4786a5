"""``tppo-fast compare``: one supervised start, every method with every seed, then the table, the curves and what they say."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console

from tppo_fast import evaluate, jobs, panel, report, sft
from tppo_fast.atomic import write_atomic
from tppo_fast.checkpoint import list_checkpoints
from tppo_fast.config import RunConfig
from tppo_fast.data.sessions import read_sessions, write_sessions
from tppo_fast.demo import small_model
from tppo_fast.errors import UserError
from tppo_fast.evaluate_command import show
from tppo_fast.experiment_config import Experiment
from tppo_fast.finetune_config import SFTConfig
from tppo_fast.jobs import Job, merged, pick
from tppo_fast.metrics import read_metrics, recorded
from tppo_fast.runs import load_sessions
from tppo_fast.sections import build_section

START = "SFT (start)"
CURVES = (
    report.Curve("relevance", "eval/relevance", ("eval/relevance_low", "eval/relevance_high")),
    report.Curve("reward", "rollout/token_reward_mean"),
    report.Curve("reward-spread", "rollout/token_reward_std"),
    report.Curve("kl", "ppo/kl"),
    report.Curve("length", "rollout/length_mean"),
)
"""Rewards stand on one scale here: every method's responses scored by the same token labels, whatever it is trained on."""
TABLE = ("relevance", "judged", "hit", "mrr", "distinct", "valid", "copy", "length")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """When one method first reached the target, over its seeds."""

    samples: list[int]
    """Responses sampled until the first evaluation at or above the target, one per seed that reached it."""
    seconds: list[float]
    """Seconds of training until then, evaluations left out."""
    missed: int
    """Seeds that never did."""


def compare(experiment: Experiment) -> list[str]:
    """Run (or continue) an experiment and write ``report.html``, its figures, ``table.csv`` and ``evaluation.json``.

    Returns:
        The verdict, a sentence each.

    Raises:
        UserError: bad settings, or a baseline that is no method.
        Interrupted: SIGINT; the running job saved a checkpoint, and the same command continues.
    """
    baseline = experiment.baseline or experiment.methods[0].name
    if baseline not in {method.name for method in experiment.methods}:
        raise UserError(f"baseline = {baseline!r}: name one of the methods")
    data = _sessions(experiment)
    start = _start(experiment, data)
    planned = jobs.plan(experiment, start, data)
    failures = jobs.run(planned)
    done = [job for job in planned if job.finished]
    if not done:
        raise UserError(f"every job failed, the first with {next(iter(failures.values()))}")
    config = done[0].config
    found, judges = _final(experiment, config, start, done)
    target = experiment.target if experiment.target is not None else _last_relevance(done, baseline)
    reached = samples_to_target(done, target)
    verdict = [*_verdicts(experiment, found, done, baseline), *_reach_sentences(reached, target)]
    if failures:
        verdict.append(
            f"{len(failures)} of {len(planned)} jobs failed and are left out: {next(iter(failures.values()))}"
        )
    duels = found.duels(judges, config.seed)
    show(found, duels)
    for sentence in verdict:
        Console().print(sentence)
    _write(experiment, found, duels, done, verdict, reached, target, failures)
    return verdict


def _sessions(experiment: Experiment) -> dict[str, str]:
    """The experiment's own copy of its sessions, the same for every job: generated or split with the first seed."""
    files = {name: experiment.run_dir / f"{name}.jsonl" for name in ("train", "eval")}
    config = build_section({"seed": experiment.seeds[0], "data": experiment.base.get("data", {})}, RunConfig)
    record = experiment.run_dir / "sessions.json"
    jobs.check_record(record, config, "base.data, or the first of seeds")
    if not all(path.exists() for path in files.values()):
        sessions = load_sessions(config)
        experiment.run_dir.mkdir(parents=True, exist_ok=True)
        jobs.keep_record(record, config)
        for path, part in zip(files.values(), sessions, strict=True):
            write_sessions(path, part)
    return {name: str(path) for name, path in files.items()}


def _start(experiment: Experiment, data: Mapping[str, str]) -> Path:
    """The supervised policy that every method starts from."""
    own = {"run_dir": str(experiment.run_dir / "start"), "seed": experiment.seeds[0], "data": dict(data)}
    values = merged(merged(pick(experiment.base, SFTConfig), experiment.start), own)
    if not values.get("model", {}).get("path"):
        folder = experiment.run_dir / "untrained"
        if not folder.is_dir():
            small_model(folder, read_sessions(data["train"]), experiment.seeds[0])
        values = merged(values, {"model": {"path": str(folder)}})
    config = build_section(values, SFTConfig)
    record = config.run_dir / "job.json"
    jobs.check_record(record, config, "start")
    if not (config.run_dir / "policy").is_dir():
        config.run_dir.mkdir(parents=True, exist_ok=True)
        jobs.keep_record(record, config)
        Console(stderr=True).print(f"[bold]SFT[/]: {config.train.steps} steps, the start of every method")
        sft.sft(config, resume=bool(list_checkpoints(config.run_dir)))
    return config.run_dir / "policy"


def _final(
    experiment: Experiment, config: RunConfig, start: Path, done: Sequence[Job]
) -> tuple[panel.Panel, panel.Judges]:
    """Every finished policy on the same held-out sessions."""
    sessions = read_sessions(experiment.run_dir / "eval.jsonl")[: experiment.sessions]
    most = max(len([j for j in done if j.method.name == m.name]) for m in experiment.methods)
    policies = {START: [start] * most}
    for method in experiment.methods:
        if folders := [job.policy for job in done if job.method.name == method.name]:
            policies[method.name] = folders
    judges = panel.Judges(labeller=panel.default_judge(config))
    return panel.evaluate_policies(config, policies, sessions, judges, responses=experiment.responses), judges


def samples_to_target(done: Sequence[Job], target: float) -> dict[str, Reach]:
    """Method -> how many responses its seeds had sampled when an evaluation first reached ``target``."""
    found: dict[str, Reach] = {}
    for job in done:
        reach = found.setdefault(job.method.name, Reach(samples=[], seconds=[], missed=0))
        for point in recorded(read_metrics(job.config.run_dir), "eval/relevance", job.samples_per_step):
            if point.value >= target:
                reach.samples.append(point.samples)
                reach.seconds.append(point.seconds)
                break
        else:
            found[job.method.name] = replace(reach, missed=reach.missed + 1)
    return found


def _last_relevance(done: Sequence[Job], name: str) -> float:
    """Mean over seeds of a method's last held-out relevance while training; NaN where no seed finished."""
    last = [
        [row["eval/relevance"] for row in read_metrics(job.config.run_dir) if row.get("eval/relevance") is not None][-1]
        for job in done
        if job.method.name == name
    ]
    return statistics.fmean(last) if last else math.nan


def _verdicts(experiment: Experiment, found: panel.Panel, done: Sequence[Job], baseline: str) -> list[str]:
    """Every method against the baseline on the seeds both have; and the baseline against the start."""
    seeds = {m.name: [job.seed for job in done if job.method.name == m.name] for m in experiment.methods}
    sentences = []
    for name in [START, *(m.name for m in experiment.methods if m.name != baseline)]:
        both = [s for s in seeds[baseline] if name == START or s in seeds[name]]
        if not both:
            continue
        mine = [found.scores[baseline]["relevance"][seeds[baseline].index(s)] for s in both]
        other = [found.scores[name]["relevance"][0 if name == START else seeds[name].index(s)] for s in both]
        gap = evaluate.paired_difference(mine, other, found.users)
        sentences.append(report.verdict(baseline, name, gap.mean, gap.low, gap.high, "eval/relevance"))
    count = len(experiment.seeds)
    covered = f"users and {count} seeds" if count > 1 else "users, not other seeds"
    return [*sentences, f"Intervals cover {covered}; they are not corrected for the number of comparisons."]


def _reach_sentences(reached: Mapping[str, Reach], target: float) -> list[str]:
    if not math.isfinite(target):
        return []
    parts = []
    for name, reach in reached.items():
        total = len(reach.samples) + reach.missed
        if reach.samples:
            spread = f" ({min(reach.samples):,} to {max(reach.samples):,})" if len(reach.samples) > 1 else ""
            missed = f", {reach.missed} of {total} seeds never" if reach.missed else ""
            parts.append(f"{name}: {int(statistics.median(reach.samples)):,}{spread}{missed}")
        else:
            parts.append(f"{name}: never in {total} seeds")
    return [f"Responses sampled until held-out relevance first reached {target:.3f}: {'; '.join(parts)}."]


def _write(
    experiment: Experiment,
    found: panel.Panel,
    duels: Sequence[panel.Duel],
    done: Sequence[Job],
    verdict: Sequence[str],
    reached: Mapping[str, Reach],
    target: float,
    failures: Mapping[str, str],
) -> None:
    """Report, figures, table and the machine-readable whole."""
    settings = experiment.model_dump(mode="json")
    folder = experiment.run_dir
    runs = [
        report.Run(name=job.method.name, rows=read_metrics(job.config.run_dir), samples_per_step=job.samples_per_step)
        for job in done
    ]
    table = {
        name: {f"eval/{m}": report.Estimate(mean=e.mean, low=e.low, high=e.high) for m, e in row.items() if m in TABLE}
        for name, row in found.table().items()
    }
    written = report.write_report(
        folder / "report.html",
        report.Report(
            title=experiment.title,
            verdict=" ".join(verdict),
            command=f"tppo-fast compare CONFIG --run_dir {folder}",
            settings=settings,
            runs=runs,
            table=table,
            curves=CURVES,
            axes=("samples", "seconds"),
            formats=("png", "svg"),
        ),
    )
    record = {
        "experiment": settings, "verdict": list(verdict), "failures": dict(failures), "machine": report.machine_record(),
        "target": target if math.isfinite(target) else None, "samples_to_target": {n: asdict(r) for n, r in reached.items()},
    }  # fmt: skip
    written += panel.write(folder, found, duels, record)
    write_atomic(folder / "curves.csv", _curves_csv(done).encode())
    Console(stderr=True).print(f"report: {folder / 'report.html'} (and {len(written)} files beside it)")


def _curves_csv(done: Sequence[Job]) -> str:
    """method, seed, samples, seconds and every drawn metric of each step."""
    names = list(dict.fromkeys(curve.metric for curve in CURVES))
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["method", "seed", "step", "samples", "seconds", *names])
    for job in done:
        seconds = 0.0
        for row in read_metrics(job.config.run_dir):
            seconds += row.get("time/step") or 0.0
            values = ["" if row.get(name) is None else row[name] for name in names]
            place = [job.method.name, job.seed, row["step"], row["step"] * job.samples_per_step]
            writer.writerow([*place, round(seconds, 3), *values])
    return buffer.getvalue()
