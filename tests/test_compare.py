"""An experiment end to end, tiny: every method from one start, failures apart, continued, reported."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tppo_fast import compare, jobs, panel, trainer
from tppo_fast.data.sessions import read_sessions
from tppo_fast.errors import JobsFailed, TrainingDiverged, UserError
from tppo_fast.estimates import holm
from tppo_fast.evaluate import paired_difference
from tppo_fast.experiment_config import Experiment
from tppo_fast.metrics import MetricsLogger
from tppo_fast.sections import build_section, load_section

ROOT = Path(__file__).parents[1]


def values(folder: Path, run_dir: Path) -> dict[str, Any]:
    return {
        "run_dir": str(run_dir), "seeds": [0, 1], "sessions": 6,
        "start": {"model": {"path": str(folder)}, "sft": {"batch_size": 4, "lr": 1e-3}, "train": {"steps": 1}},
        "base": {
            "threads": 1, "device": "cpu", "data": {"synthetic_sessions": 40, "max_prompt_tokens": 180},
            "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 6},
            "reward": {"scale": "binary"}, "ppo": {"lr": 1e-3, "epochs": 1},
            "train": {"steps": 2, "eval_every": 1, "eval_prompts": 3, "show_examples": 0, "tensorboard": False},
        },
        "methods": [
            {"name": "TPPO", "algorithm": "tppo", "settings": {"ppo": {"gamma": 0.7}}},
            {"name": "GRPO", "algorithm": "grpo"},
            {"name": "DPO [/]", "algorithm": "dpo", "settings": {"dpo": {"batch_size": 2, "max_pairs": 4}}},
        ],
    }  # fmt: skip


def test_an_experiment_survives_a_failure_continues_and_reports(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "e"
    experiment = build_section(values(tiny_model, run_dir), Experiment)
    original = trainer.train

    def failing(config: Any, *, resume: bool = False) -> Any:
        if config.algorithm == "grpo" and config.seed == 1:
            raise TrainingDiverged({"step": 1})
        return original(config, resume=resume)

    monkeypatch.setattr(trainer, "train", failing)
    shown: list[bool] = []
    show = compare.show
    monkeypatch.setattr(compare, "show", lambda *a: (shown.append((run_dir / "report.html").exists()), show(*a)))
    with pytest.raises(JobsFailed, match="1 of 6 jobs failed; the report is of the others"):
        compare.compare(experiment)
    assert shown == [True]  # written before it is shown
    verdict = json.loads((run_dir / "evaluation.json").read_text())["record"]["verdict"]
    assert any("1 of 6 jobs failed" in sentence for sentence in verdict)
    assert any("No difference could be shown between TPPO and" in sentence for sentence in verdict)
    kept = {
        path: path.stat().st_mtime_ns
        for path in run_dir.rglob("policy/model.safetensors")
        if "checkpoints" not in path.parts
    }
    assert len(kept) == 6  # the start and five jobs
    monkeypatch.setattr(trainer, "train", original)
    verdict = compare.compare(experiment)
    assert not any("failed" in sentence for sentence in verdict)
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    page = (run_dir / "report.html").read_text()
    assert "seconds of training" in page
    for name in ("relevance", "relevance-seconds", "reward", "reward-spread", "length", "kl"):
        for kind in ("png", "svg"):
            assert (run_dir / f"report-{name}.{kind}").stat().st_size > 1000
    users = [{s.user_id for s in read_sessions(run_dir / f"{name}.jsonl")} for name in ("train", "eval", "test")]
    assert all(users)
    assert not users[0] & users[1] | users[0] & users[2] | users[1] & users[2]  # checkpoints are chosen by the second
    tested = {s.user_id for s in read_sessions(run_dir / "test.jsonl")[:6]}
    whole = json.loads((run_dir / "evaluation.json").read_text())
    assert whole["table"]["TPPO"]["relevance"]["users"] == len(tested)
    assert list(whole["table"]) == ["copy the last query", compare.START, "TPPO", "GRPO", "DPO [/]"]
    assert whole["record"]["samples_to_target"]["TPPO"]["samples"] is not None
    against = whole["record"]["against"]
    assert list(against) == [compare.START, "GRPO", "DPO [/]"]
    for name, row in against.items():
        for metric, gap in row.items():  # as in the table, on the same seeds
            ours, theirs = whole["table"]["TPPO"][metric]["mean"], whole["table"][name][metric]["mean"]
            assert gap["mean"] == pytest.approx(ours - theirs)
    assert any("share judged relevant" in sentence for sentence in verdict)
    assert "Holm's method for the 3 comparisons of a measure." in " ".join(verdict)
    assert "TPPO against each" in page
    rows = list(csv.DictReader((run_dir / "curves.csv").read_text().splitlines()))
    assert {(row["method"], row["seed"]) for row in rows} == {(m, s) for m in ("TPPO", "GRPO", "DPO [/]") for s in "01"}
    assert max(int(row["samples"]) for row in rows if row["method"] == "TPPO") == 8
    changed = values(tiny_model, run_dir)
    changed["methods"][0]["settings"]["ppo"]["gamma"] = 1.0
    with pytest.raises(UserError, match=r"'TPPO': ppo\.gamma = 1\.0, but .*job\.json' ran with 0\.7"):
        compare.compare(build_section(changed, Experiment))
    for section, name, other, message in (
        ("start", "sft", {"lr": 2e-3}, r"start: sft\.batch_size = 32, but .* ran with 4"),
        (
            "base",
            "data",
            {"synthetic_sessions": 50, "max_prompt_tokens": 180},
            r"base\.data.*: data\.synthetic_sessions = 50, but",
        ),
    ):
        changed = values(tiny_model, run_dir)
        changed[section][name] = other
        with pytest.raises(UserError, match=message):
            compare.compare(build_section(changed, Experiment))
    changed = values(tiny_model, run_dir)
    changed["base"]["threads"] = 2  # changes no result
    threads = build_section(changed, Experiment)
    assert all(job.finished for job in jobs.plan(threads, run_dir / "start" / "policy", compare._data(threads)))
    assert compare._start_config(threads).threads == 2


def test_when_every_job_fails_it_is_no_bad_input_and_any_name_can_be_shown(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(*_: Any, **__: Any) -> None:
        raise TrainingDiverged({"step": 1})

    monkeypatch.setattr(compare, "_supervise", lambda *_: None)
    monkeypatch.setattr(trainer, "train", diverging)
    given = values(tiny_model, tmp_path / "e") | {"methods": [{"name": "[/bold] A", "algorithm": "tppo"}]}
    with pytest.raises(JobsFailed, match=r"^every job failed, the first with TrainingDiverged: step 1"):
        compare.compare(build_section(given, Experiment))


@pytest.mark.parametrize("name", ["SFT (start)", "copy the last query"])
def test_a_methods_name_is_its_own(name: str, tiny_model: Path, tmp_path: Path) -> None:
    given = values(tiny_model, tmp_path / "e") | {"methods": [{"name": name, "algorithm": "tppo"}]}
    with pytest.raises(UserError, match=r"methods: .* is the name of a row that is always there"):
        compare.compare(build_section(given, Experiment))
    assert not (tmp_path / "e").exists()


def test_samples_to_target_by_hand(tmp_path: Path) -> None:
    base = {
        "run_dir": str(tmp_path),
        "seeds": [0, 1],
        "base": {"rollout": {"prompts_per_step": 4, "samples_per_prompt": 2}},
    }
    experiment = build_section({**base, "methods": [{"name": "A", "algorithm": "tppo"}]}, Experiment)
    planned = jobs.plan(experiment, tmp_path, {})
    for job, curve in zip(planned, ((0.1, 0.3, 0.5), (0.1, 0.2, 0.25)), strict=True):
        with MetricsLogger(job.config.run_dir, tensorboard=False, config={}) as logger:
            for step, value in enumerate(curve):
                logger.log(10 * step, {"eval/relevance": value})
    reach = compare.samples_to_target(planned, 0.3)["A"]
    assert (reach.samples, reach.missed) == ([10 * 8], 1)
    [said] = compare._reach_sentences(planned, compare.samples_to_target(planned, 0.3), 0.3)
    assert said == "Responses sampled until held-out relevance first reached 0.300: A: 80, 1 of 2 seeds never."
    assert not compare._reach_sentences(planned, compare.samples_to_target(planned, 0.1), 0.1)  # where the start is


def test_the_baseline_against_each_on_the_seeds_both_have_p_values_corrected(tmp_path: Path) -> None:
    methods = [{"name": name, "algorithm": "tppo"} for name in ("A", "B", "C")]
    experiment = build_section({"run_dir": str(tmp_path), "seeds": [0, 1], "methods": methods}, Experiment)
    done = [job for job in jobs.plan(experiment, tmp_path, {}) if (job.method.name, job.seed) != ("B", 0)]
    rng = np.random.default_rng(0)
    users = [f"user {i}" for i in range(40)]
    given = {
        name: rng.normal(level, 1.0, (runs, 40))
        for name, runs, level in ((compare.START, 2, -1.0), ("A", 2, 0.0), ("B", 1, -1.0), ("C", 2, -0.1))
    }
    scores = {name: {"relevance": values, "judged": values} for name, values in given.items()}
    against = compare._against(experiment, panel.Panel(users=users, scores=scores), done, "A", 0)
    ours = given["A"]
    raw = {
        compare.START: paired_difference(ours, given[compare.START][[0, 0]], users),
        "B": paired_difference(ours[[1]], given["B"], users),  # seed 1 alone
        "C": paired_difference(ours, given["C"], users),
    }
    expected = holm([*raw.values()])
    assert [row["judged"] for row in against.values()] == expected
    assert [each.p for each in expected] != [each.p for each in raw.values()]
    sentences = compare._verdicts(experiment, against, "A")
    assert len(sentences) == 2 * 3 + 1
    assert "A is above B on held-out relevance by" in sentences[1]
    assert f"corrected p {expected[1].p:.3f})" in sentences[1]
    assert "Holm's method for the 3 comparisons of a measure" in sentences[-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methods": []}, r"methods = \[\]: give at least one"),
        (
            {"methods": [{"name": "A"}]},
            r"^methods\['A'\]\.algorithm is missing: .*, give one of tppo, control, ppo, grpo,",
        ),
        ({"methods": [{"algorithm": "dpo"}]}, r"^methods\[0\]\.name is missing: it has no default$"),
        (
            {"methods": [{"name": "A", "algoritm": "dpo"}]},
            r"unknown setting .*'A'\]\.algoritm.*mean 'methods\.algorithm'",
        ),
        ({"methods": [{"name": "A", "algorithm": "tpo"}]}, r"^methods\['A'\]\.algorithm = 'tpo': input should be"),
        ({"methods": {"A": {}}}, r"methods = .*\[\[table\]\] for each"),
        ({"methods": [{"name": "A", "algorithm": "tppo"}] * 2}, "two methods are called 'A'"),
        ({"methods": [{"name": "A", "algorithm": "tppo", "settings": {"ppo": {"gama": 1}}}]}, r"method 'A'.*ppo\.gam"),
        ({"methods": [{"name": n, "algorithm": "tppo"} for n in ("A b", "a-b")]}, "differ in punctuation"),
        (
            {"methods": [{"name": "A", "algorithm": "tppo", "settings": {"ppo": {"loss": "nowhere:f"}}}]},
            r"^method 'A': ppo\.loss = 'nowhere:f'",
        ),
        ({"baseline": "nobody"}, "baseline = 'nobody'"),
        ({"seeds": [0, 3, 3]}, r"^seeds = \[0, 3, 3\]: 3 stands there twice; give each seed once$"),
        ({"base": {"rolout": {}}}, r"^unknown setting 'base\.rolout': there are data, device, dpo, model, "),
        ({"start": {"model": 3}}, r"^model = 3: this is a section"),
        ({"base": {"seed": 3}}, r"^base\.seed = 3: compare sets it for every job; remove it$"),
        ({"start": {"run_dir": "x"}}, r"^start\.run_dir = 'x': compare sets it"),
        (
            {"methods": [{"name": "A", "algorithm": "tppo", "settings": {"seed": 1}}]},
            r"^settings\.seed = 1: compare sets",
        ),
    ],
)
def test_bad_input_is_one_sentence(tiny_model: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        compare.compare(build_section(values(tiny_model, tmp_path / "e") | change, Experiment))
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("name", ["train", "eval", "test"])
def test_sessions_of_others_stay_and_are_not_taken(tiny_model: Path, tmp_path: Path, name: str) -> None:
    mine = tmp_path / f"{name}.jsonl"
    mine.write_text("mine")
    given = values(tiny_model, tmp_path)
    given["base"]["data"]["train"] = str(mine)
    with pytest.raises(
        UserError, match=rf"^run_dir = .* has a '{name}\.jsonl' that no experiment wrote: choose another, or"
    ):
        compare.compare(build_section(given, Experiment))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(mine.name, "mine")]


@pytest.mark.parametrize("name", ["sessions.json", "start/job.json", "tppo/seed-0/job.json"])
@pytest.mark.parametrize("damage", ['{"se', "[]", "\xff"])
def test_a_damaged_record_is_one_sentence(tiny_model: Path, tmp_path: Path, name: str, damage: str) -> None:
    record = tmp_path / "e" / name
    record.parent.mkdir(parents=True)
    record.write_text(damage, encoding="latin-1")
    with pytest.raises(UserError, match=rf"^'.*{name}' is damaged \(.*\): start again in another folder$"):
        compare.compare(build_section(values(tiny_model, tmp_path / "e"), Experiment))


def test_a_run_dir_that_is_a_file_is_named(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "e").write_text("mine")
    with pytest.raises(UserError, match=r"^run_dir = '.*e' cannot be made \(File exists\): choose another$"):
        compare.compare(build_section(values(tiny_model, tmp_path / "e"), Experiment))


def test_the_shipped_experiment_is_valid_and_separates_the_discount() -> None:
    experiment = load_section(ROOT / "experiments" / "query_generation.toml", [], Experiment)
    planned = jobs.plan(experiment, Path("start"), {})
    discounts = {(job.config.algorithm, job.config.ppo.gamma) for job in planned if hasattr(job.config, "ppo")}  # type: ignore[attr-defined]
    assert discounts >= {("tppo", 1.0), ("tppo", 0.7), ("control", 1.0), ("control", 0.7)}
    assert {job.samples_per_step * job.config.train.steps for job in planned} == {7680}
    assert planned[0].config.ppo.value_clip is None  # type: ignore[attr-defined]


def test_the_shipped_sweep_of_learning_rates_is_valid() -> None:
    experiment = load_section(ROOT / "experiments" / "learning_rates.toml", [], Experiment)
    final = load_section(ROOT / "experiments" / "query_generation.toml", [], Experiment)
    assert not set(experiment.seeds) & set(final.seeds)
    assert len(jobs.plan(experiment, Path("start"), {})) == 2 * 6 * 4


def test_the_shipped_experiment_on_real_sessions_is_valid_and_samples_alike() -> None:
    given = ["--base.data.train", "mine.jsonl"]
    experiment = load_section(ROOT / "experiments" / "real_sessions.toml", given, Experiment)
    planned = jobs.plan(experiment, Path("start"), {})
    assert experiment.base["data"]["train"] == "mine.jsonl"
    assert {job.samples_per_step * job.config.train.steps for job in planned} == {320}
    assert {job.config.rollout.engine for job in planned} == {"vllm"}
