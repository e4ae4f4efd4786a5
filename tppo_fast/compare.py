"""``tppo-fast compare``: every method with every seed from one SFT checkpoint, then the table, the curves and a verdict."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tppo_fast import job_process, jobs, panel, report, seeding, sft
from tppo_fast.atomic import atomic_folder, write_atomic
from tppo_fast.config import RunConfig
from tppo_fast.data.sessions import of_many_users, read_sessions, split_by_user, write_sessions
from tppo_fast.demo import small_model
from tppo_fast.errors import JobsFailed, UserError
from tppo_fast.estimates import Difference
from tppo_fast.evaluate_command import show
from tppo_fast.experiment_config import Experiment
from tppo_fast.finetune_config import SFTConfig
from tppo_fast.jobs import Job, merged, pick
from tppo_fast.metrics import read_metrics, recorded
from tppo_fast.progress import say, table_console
from tppo_fast.run_dir import list_checkpoints, make_run_dir
from tppo_fast.runs import load_sessions
from tppo_fast.sections import build_section

START = "SFT (start)"
UNTRAINED = "untrained"
"""Folder of the small model that is made where the start names none."""
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
    """Run (or continue) an experiment and write ``report.html``, its figures, its curves and what ``panel.write`` does.

    Returns:
        The verdict, a sentence each.

    Raises:
        UserError: bad settings, or a baseline that is no method, before anything runs.
        JobsFailed: jobs failed; what the others found is in the report.
        Interrupted: SIGINT, SIGTERM or SIGHUP; the running job saved a checkpoint, and the same command continues.
    """
    names = [method.name for method in experiment.methods]
    baseline = experiment.baseline or names[0]
    if baseline not in names:
        raise UserError(f"baseline = {baseline!r}: name one of the methods")
    if taken := {START, panel.COPY_LAST}.intersection(names):
        raise UserError(f"methods: {taken.pop()!r} is the name of a row that is always there; choose another")
    sessions, start = _sessions_config(experiment), _start_config(experiment)
    planned = jobs.plan(experiment, start.run_dir / "policy", _data(experiment))
    _write_sessions(experiment, sessions)
    _supervise(experiment, start)
    at_once = experiment.at_once
    failures = jobs.run(planned) if at_once == 1 else job_process.run_side_by_side(planned, at_once)
    done = [job for job in planned if job.finished]
    if not done:
        raise JobsFailed(f"every job failed, the first with {next(iter(failures.values()))}")
    config = done[0].config
    found, judges = _final(experiment, config, start.run_dir / "policy", done)
    ours = [job for job in done if job.method.name == baseline]
    target = experiment.target if experiment.target is not None else _relevance(ours, -1)
    reached = samples_to_target(done, target)
    against = _against(experiment, found, done, baseline, config.seed)
    verdict = [*_verdicts(experiment, against, baseline), *_reach_sentences(done, reached, target)]
    if failures:
        verdict.append(
            f"{len(failures)} of {len(planned)} jobs failed and are left out: {next(iter(failures.values()))}"
        )
    duels = found.duels(judges, config.seed)
    _write(experiment, found, duels, done, baseline, against, verdict, reached, target, failures)
    show(found, duels)
    for sentence in verdict:
        table_console().print(sentence, markup=False)
    if failures:
        raise JobsFailed(
            f"{len(failures)} of {len(planned)} jobs failed; the report is of the others, the same command tries again"
        )
    return verdict


def _data(experiment: Experiment) -> dict[str, str]:
    """The sessions that every job learns from, and those that it looks at while it trains."""
    return {name: str(experiment.run_dir / f"{name}.jsonl") for name in ("train", "eval")}


def _test(experiment: Experiment) -> Path:
    """The sessions of the final table, which no job sees."""
    return experiment.run_dir / "test.jsonl"


def _session_files(experiment: Experiment) -> list[Path]:
    """Those that are learned from, looked at, and tested on."""
    return [*map(Path, _data(experiment).values()), _test(experiment)]


def _sessions_config(experiment: Experiment) -> RunConfig:
    """How the sessions are generated or split: with the first seed."""
    config = build_section({"seed": experiment.seeds[0], "data": experiment.base.get("data", {})}, RunConfig)
    record = experiment.run_dir / "sessions.json"
    foreign = [path.name for path in _session_files(experiment) if path.exists() and not record.exists()]
    if foreign:
        raise UserError(
            f"run_dir = {str(experiment.run_dir)!r} has a {foreign[0]!r} that no experiment wrote: choose another, or move it"
        )
    jobs.check_record(record, config, "base.data, or the first of seeds")
    return config


def _write_sessions(experiment: Experiment, config: RunConfig) -> None:
    files = _session_files(experiment)
    if not all(path.exists() for path in files):
        rest, test = load_sessions(config)
        seed = seeding.derive(config.data.split_seed, "validation")
        train, validation = split_by_user(rest, config.data.eval_fraction, seed)
        make_run_dir(experiment.run_dir)
        jobs.keep_record(experiment.run_dir / "sessions.json", config)
        for path, part in zip(files, (train, of_many_users(validation), test), strict=True):
            write_sessions(path, part)


def _start_config(experiment: Experiment) -> SFTConfig:
    """How the policy that every method starts from is supervised."""
    own = {"run_dir": str(experiment.run_dir / "start"), "seed": experiment.seeds[0], "data": _data(experiment)}
    values = merged(merged(pick(experiment.base, SFTConfig), experiment.start), own)
    config = build_section(values, SFTConfig)
    if not config.model.path:
        config = build_section(merged(values, {"model": {"path": str(experiment.run_dir / UNTRAINED)}}), SFTConfig)
    jobs.check_record(config.run_dir / "job.json", config, "start")
    return config


def _supervise(experiment: Experiment, config: SFTConfig) -> None:
    """Train the start, unless it is there."""
    if (config.run_dir / "policy").is_dir():
        return
    untrained = experiment.run_dir / UNTRAINED
    if config.model.path == str(untrained) and not untrained.is_dir():
        with atomic_folder(untrained) as temporary:
            small_model(temporary, read_sessions(config.data.train), config.seed)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    jobs.keep_record(config.run_dir / "job.json", config)
    say(f"[bold]SFT[/]: {config.train.steps} steps, the start of every method")
    sft.sft(config, resume=bool(list_checkpoints(config.run_dir)))


def _final(
    experiment: Experiment, config: RunConfig, start: Path, done: Sequence[Job]
) -> tuple[panel.Panel, panel.Judges]:
    """Every finished policy on the same held-out sessions."""
    sessions = read_sessions(_test(experiment))[: experiment.sessions]
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


def _relevance(done: Sequence[Job], which: int) -> float:
    """Mean over jobs of an evaluation's held-out relevance while training, 0 the first and -1 the last; NaN without any."""
    found = [
        [row["eval/relevance"] for row in read_metrics(job.config.run_dir) if row.get("eval/relevance") is not None]
        for job in done
    ]
    chosen = [values[which] for values in found if values]
    return statistics.fmean(chosen) if chosen else math.nan


def _against(
    experiment: Experiment, found: panel.Panel, done: Sequence[Job], baseline: str, seed: int
) -> dict[str, dict[str, Difference]]:
    """The baseline minus the start and every other method, in every metric, on the seeds both have; p-values corrected."""
    seeds = {m.name: [job.seed for job in done if job.method.name == m.name] for m in experiment.methods}
    gaps = {}
    for name in [START, *(m.name for m in experiment.methods if m.name != baseline)]:
        both = [s for s in seeds[baseline] if name == START or s in seeds[name]]
        if not both:
            continue
        mine = [seeds[baseline].index(s) for s in both]
        other = [0 if name == START else seeds[name].index(s) for s in both]
        left, right = (
            {metric: values[rows] for metric, values in found.scores[policy].items()}
            for policy, rows in ((baseline, mine), (name, other))
        )
        gaps[name] = panel.differences(left, right, found.users, seed=seed)
    return panel.corrected(gaps)


def _verdicts(experiment: Experiment, against: Mapping[str, Mapping[str, Difference]], baseline: str) -> list[str]:
    """Every comparison in relevance, and in the paper's own measure."""
    sentences = [
        report.verdict(baseline, name, gap.mean, gap.low, gap.high, f"eval/{metric}", p=gap.p)
        for metric in ("relevance", "judged")
        for name, row in against.items()
        for gap in [row[metric]]
    ]
    count = len(experiment.seeds)
    covered = f"users and {count} seeds" if count > 1 else "users, not other seeds"
    correction = f"p-values are corrected by Holm's method for the {len(against)} comparisons of a measure"
    return [*sentences, f"Each interval covers {covered}, for itself; {correction}."]


def _reach_sentences(done: Sequence[Job], reached: Mapping[str, Reach], target: float) -> list[str]:
    """When each method reached the target; nothing about one that is not above the start."""
    if not math.isfinite(target) or target <= _relevance(done, 0):
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
    baseline: str,
    against: Mapping[str, Mapping[str, Difference]],
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
    table = {name: {f"eval/{m}": e for m, e in row.items() if m in TABLE} for name, row in found.table.items()}
    gaps = {name: {f"eval/{m}": e for m, e in row.items() if m in TABLE} for name, row in against.items()}
    written = report.write_report(
        folder / "report.html",
        report.Report(
            title=experiment.title,
            verdict=" ".join(verdict),
            command=f"tppo-fast compare CONFIG --run_dir {folder}",
            settings=settings,
            runs=runs,
            table=table,
            baseline=baseline,
            differences=gaps,
            curves=CURVES,
            axes=("samples", "seconds"),
            formats=("png", "svg"),
        ),
    )
    record = {
        "experiment": settings, "verdict": list(verdict), "failures": dict(failures), "machine": report.machine_record(),
        "against": {name: {m: asdict(e) for m, e in row.items()} for name, row in against.items()}, "baseline": baseline,
        "target": target if math.isfinite(target) else None, "samples_to_target": {n: asdict(r) for n, r in reached.items()},
    }  # fmt: skip
    written += panel.write(folder, found, duels, record)
    write_atomic(folder / "curves.csv", _curves_csv(done).encode())
    say(f"report: {folder / 'report.html'} (and {len(written)} files beside it)", markup=False)


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
            values = ["" if (value := row.get(name)) is None else f"{value:.6g}" for name in names]
            place = [job.method.name, job.seed, row["step"], row["step"] * job.samples_per_step]
            writer.writerow([*place, round(seconds, 3), *values])
    return buffer.getvalue()
