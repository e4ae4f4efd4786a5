"""The step suites run at a tiny size: peers in their own processes, levers counted, and a gate that refuses."""

from __future__ import annotations

import importlib.util
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_step, gpu_step, peer_envs, step_ours
from benchmarks.drivers.ruler import Stopwatch
from benchmarks.results import Options
from benchmarks.step_work import ALL_OFF, LEVERS, OWN, SHARED, UNSHARED_PROMPTS, Row, inputs, whole, works


@pytest.mark.filterwarnings("ignore")
def test_the_step_suite_runs_at_a_tiny_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's trainer and ours compute the same iterations; each lever saves what it is for, counted."""
    pytest.importorskip("trl")
    twice = "tppo_fast: own critic, vLLM"  # one start of vLLM is enough
    monkeypatch.setattr(bench_step, "whole", lambda **k: [row for row in whole(**k) if row.provider != twice])
    outcome = bench_step.run(Options(quick=True, scratch=tmp_path))
    rows = {(row.case, row.provider): row for row in outcome.results}
    without = importlib.util.find_spec("vllm") is None
    assert {row.provider for row in outcome.results if row.problem and row.provider != "TRL GRPO"} == (
        {"tppo_fast: shared body, vLLM"} if without else set()
    )
    title = "PPO iteration, small Llama"
    for case in (title, f"{title}, rollout", f"{title}, prepare", f"{title}, update"):
        assert rows[case, "TRL PPO"].problem is None
        assert rows[case, "TRL PPO"].host_peak_bytes
        assert rows[case, "tppo_fast: own critic"].ratio
    metrics = outcome.settings[title]["TRL PPO"]["metrics"]
    assert len(metrics) == 2  # the second iteration starts from weights that two epochs moved
    assert abs(metrics[1]["kl"]) > 0
    levers = "PPO levers, small Llama, update FLOPs"
    lean = rows[levers, "tppo_fast: shared body"]
    assert lean.host_peak_bytes
    for provider, at_least in {
        "tppo_fast: own critic": 1.3,
        "tppo_fast: shared body, prompts not shared": 2,
        "tppo_fast: shared body, head at 4 GEMMs": 1.001,
        "tppo_fast: all levers off": 3,
    }.items():
        assert rows[levers, provider].values[0] > at_least * lean.values[0], provider


def test_a_provider_that_computes_something_else_has_no_time() -> None:
    row = whole(small=True)[1]
    fine = {"metrics": [{"reward": 0.5, "kl": 0.0, "policy_loss": 0.1, "value_loss": 0.2, "entropy": 3.0}]}
    off = {"metrics": [{**fine["metrics"][0], "value_loss": 0.21}]}
    assert bench_step.disagreement(row, fine, fine) is None
    assert bench_step.disagreement(row, off, fine) == (
        "it disagrees with TRL PPO: value_loss of iteration 0 is 0.21, not 0.2"
    )
    later = {"metrics": [*fine["metrics"], off["metrics"][0]]}
    twice = {"metrics": fine["metrics"] * 2}
    assert "of iteration 1" in (bench_step.disagreement(row, later, twice) or "")
    assert bench_step.disagreement(replace(row, first=True), later, twice) is None
    for rows in (LEVERS, whole(small=True), whole(small=False)):
        assert {row.like for row in rows} - {None} <= {row.provider for row in rows}


def test_a_provider_that_learns_something_else_has_no_time() -> None:
    row, start = whole(small=True)[1], torch.tensor([-10.0, -12.0])
    theirs = {"logprobs": start + torch.tensor([3.0, -4.0])}
    near = {"logprobs": theirs["logprobs"] + torch.tensor([0.0, 0.02])}
    assert bench_step.unlike(row, near, theirs, start) is None
    assert bench_step.unlike(row, {"logprobs": start}, theirs, start) == (
        "it disagrees with TRL PPO: their policies are 100.0% apart of what that one learned"
    )
    assert bench_step.unlike(replace(row, learned=False), {"logprobs": start}, theirs, start) is None


@pytest.mark.parametrize("changes", [{"lr": 0.0}, {"gamma": 0.5}, {"value_coef": 3.0, "settings": SHARED}])
def test_what_is_learned_tells_trainers_apart(tmp_path: Path, changes: dict[str, Any]) -> None:
    """One iteration of one epoch, whose losses precede the step; with one body the value loss moves the policy, too."""
    work = replace(works(Options(quick=True, scratch=tmp_path))[0], epochs=1, iterations=1)
    given, start = inputs(work, 0, responses=True), None
    row = Row(provider="tppo_fast", like="itself", metrics=())
    settings = {"settings": OWN, "learned": True, **{k: v for k, v in changes.items() if k == "settings"}}
    _, one = step_ours.run(work.request(1, **settings), given)
    _, same = step_ours.run(work.request(1, **settings), given)
    _, other = step_ours.run(work.request(1, **settings) | changes, given)
    start = bench_step._start(work, given["sequences"][0])
    assert bench_step.unlike(row, same, one, start) is None
    assert "apart of what that one learned" in (bench_step.unlike(row, other, one, start) or "")


def test_a_gpu_step_that_comes_too_late_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each part has the lean loop and its share of the others; test_benchmarks.py runs them dry."""
    found = gpu_step.run(1e12, tmp_path, part=1, parts=3, deadline=time.monotonic() - 1, dry=True)
    assert {row.problem for row in found} == {"left out: the time was over"}
    assert {row.provider for row in found} == {row.provider for row in gpu_step.rows_of(1, 3, dry=True)}
    assert "TRL PPO: left out: the time was over" in capsys.readouterr().out
    seen = [{row.provider for row in gpu_step.rows_of(part, 3, dry=True)} for part in (1, 2, 3)]
    assert set.intersection(*seen) == {"tppo_fast: shared body"}
    assert len(set.union(*seen)) == len(gpu_step.OTHERS) - 5 + 1  # all, the compiled ones aside, and the lean loop


def test_a_gpu_row_has_no_time_where_the_row_it_must_agree_with_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(row: Row, *_: Any, **__: Any) -> dict[str, Any]:
        phases = {f"{phase}_{what}": 1.0 for phase in ("prepare", "update") for what in ("seconds", "peak_gib")}
        fine = {"iterations": [phases] * 2, "metrics": [{"value_loss": 1.0, "entropy": 1.0}] * 2}
        return {"problem": "out of memory"} if row is gpu_step.LEAN else fine

    kept: list[int] = []
    monkeypatch.setattr(gpu_step, "answer_of", answer)
    found = gpu_step.run(
        1e12,
        tmp_path,
        part=1,
        parts=1,
        deadline=time.monotonic() + 1e6,
        dry=True,
        keep=lambda rows: kept.append(len(rows)),
    )
    assert kept == [*range(3, len(found) + 1, 3)]
    problems = {row.provider: row.problem for row in found}
    assert problems.pop("TRL PPO") is None
    assert problems.pop("tppo_fast: shared body") == "out of memory"
    assert set(problems.values()) == {"tppo_fast: shared body, which it must agree with, failed"}


def test_needed_flops_are_those_that_the_trainer_counts(tmp_path: Path) -> None:
    """The formula of a whole step, which TRL's row is held to as well, against the trainer's own sums over microbatches."""
    work = replace(works(Options(quick=True, scratch=tmp_path))[0], epochs=1, iterations=1)
    for settings in (SHARED, ALL_OFF, UNSHARED_PROMPTS):
        answer, _ = step_ours.run(work.request(1, settings=settings), inputs(work, 0, responses=True))
        needed = gpu_step.needed_flops(replace(whole(small=True)[1], changes={"settings": settings}), work)
        assert answer["metrics"][0]["prepare_tflop"] == pytest.approx(needed["prepare"] / 1e12)
        assert answer["metrics"][0]["update_tflop"] == pytest.approx(needed["update"] / 1e12)


def test_a_phase_ends_once() -> None:
    watch = Stopwatch()
    watch.begin()
    watch.mark("rollout")
    first = dict(watch._row)
    watch.mark("rollout")
    assert watch._row == first
    watch.mark("prepare")
    watch.end()
    (row,) = watch.iterations
    assert row["whole_seconds"] == sum(row[f"{phase}_seconds"] for phase in ("rollout", "prepare", "update"))
    assert row["whole_peak_gib"] > 0


def test_a_peer_says_why_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not installed, failed to install (the reason is kept), and made from other pins than today's."""
    monkeypatch.setattr(peer_envs, "ROOT", tmp_path / "envs")
    monkeypatch.setattr(peer_envs, "PINS", tmp_path)
    pins = tmp_path / "nobody.txt"
    pins.write_text("# peer: no-such-package==1.0\nno-such-package==1.0\n")
    assert (
        peer_envs.missing("nobody")
        == "no-such-package==1.0 has no environment here: python -m benchmarks.peer_envs nobody"
    )

    def refuse(*_: object) -> None:
        raise subprocess.CalledProcessError(1, ["pip"], stderr="noise\nERROR: No matching distribution\n")

    monkeypatch.setattr(peer_envs, "_pip", refuse)
    monkeypatch.setattr(peer_envs, "_venv", lambda folder: folder.mkdir(parents=True))
    assert peer_envs.make("nobody") == "failed: No matching distribution"
    assert peer_envs.missing("nobody") == "no-such-package==1.0 could not be installed: No matching distribution"
    pins.write_text(pins.read_text() + "another==2.0\n")
    assert "has no environment here" in (peer_envs.missing("nobody") or "")


@pytest.mark.parametrize("name", peer_envs.names())
def test_a_peer_runs_on_our_libraries(name: str) -> None:
    """But for the peer itself, an environment holds the versions of constraints.txt."""
    ours = (Path(__file__).parents[1] / "constraints.txt").read_text().lower().replace("_", "-").splitlines()
    pins = peer_envs.pins(name)
    assert peer_envs.peer(name) in pins
    assert not [pin for pin in pins if pin != peer_envs.peer(name) and pin not in ours]
