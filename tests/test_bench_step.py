"""The step suites run at a tiny size: peers in their own processes, levers counted, and a gate that refuses."""

from __future__ import annotations

import importlib.util
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from benchmarks import __main__ as runner
from benchmarks import bench_step, gpu_step, peer_envs, providers, step_ours
from benchmarks.drivers.ruler import Stopwatch
from benchmarks.results import Options
from benchmarks.step_work import (
    ALL_OFF,
    LEVERS,
    OWN,
    SHARED,
    TRL,
    UNSHARED_PROMPTS,
    Row,
    comparisons,
    inputs,
    whole,
    works,
)
from tppo_fast import flops
from tppo_fast.errors import UserError


@pytest.mark.filterwarnings("ignore")
def test_the_step_suite_runs_at_a_tiny_size(tmp_path: Path) -> None:
    """TRL's trainer and ours compute the same iterations; each lever saves what it is for, counted."""
    pytest.importorskip("trl")
    outcome = bench_step.run(Options(quick=True, scratch=tmp_path))
    rows = {(row.case, row.provider): row for row in outcome.results}
    absent = {"tppo_fast: shared body, vLLM"} if importlib.util.find_spec("vllm") is None else set()
    absent |= {"TRL GRPO", "tppo_fast: GRPO"} if peer_envs.python_of("trl-grpo") is None else set()
    assert {row.provider for row in outcome.results if row.problem} == absent
    size = "small Llama, 2 prompts of 24, 4 responses of 4"
    title = f"PPO iteration, {size}"
    for case in (title, f"{title}, rollout", f"{title}, prepare", f"{title}, update"):
        assert rows[case, "TRL PPO"].problem is None
        assert rows[case, "TRL PPO"].host_peak_bytes
        assert rows[case, "tppo_fast: own critic"].ratio
    metrics = outcome.settings[title]["TRL PPO"]["metrics"]
    assert len(metrics) == 2  # the second iteration starts from weights that two epochs moved
    assert abs(metrics[1]["kl"]) > 0
    levers = f"PPO levers, {size}, update FLOPs"
    lean = rows[levers, "tppo_fast: shared body"]
    assert lean.host_peak_bytes
    for provider, at_least in {
        "tppo_fast: own critic": 1.3,
        "tppo_fast: shared body, prompts not shared": 2,
        "tppo_fast: shared body, head at 4 GEMMs": 1.001,
        "tppo_fast: all levers off": 3,
    }.items():
        assert rows[levers, provider].values[0] > at_least * lean.values[0], provider


FINE = {"reward": 0.5, "kl": 0.0, "policy_loss": 0.1, "value_loss": 0.2, "entropy": 3.0}
START = torch.tensor([-10.0, -12.0])


def answer(metrics: Sequence[dict[str, float]] = (FINE,), moved: float = 1.0, response: int = 5) -> dict[str, Any]:
    """What a row leaves of one turn."""
    return {"metrics": list(metrics), "logprobs": START + moved, "sequences": torch.full((1, 2, 3), response)}


def test_a_provider_that_computes_something_else_has_no_time() -> None:
    row = whole(small=True)[1]
    off = {**FINE, "value_loss": 0.21}
    assert bench_step.disagreement(row, answer(), answer()) is None
    assert bench_step.disagreement(row, answer([off]), answer()) == (
        "it disagrees with TRL PPO: value_loss of iteration 0 is 0.21, not 0.2"
    )
    later, twice = answer([FINE, off]), answer([FINE, FINE])
    assert "of iteration 1" in (bench_step.disagreement(row, later, twice) or "")
    assert bench_step.disagreement(replace(row, first=True), later, twice) is None
    for rows in (LEVERS, whole(small=True), whole(small=True, vllm=False), whole(small=False)):
        assert {row.like for row in rows} - {None} <= {row.provider for row in rows}


def test_a_provider_that_learns_something_else_has_no_time() -> None:
    row = whole(small=True)[1]
    theirs = {"logprobs": START + torch.tensor([3.0, -4.0])}
    near = {"logprobs": theirs["logprobs"] + torch.tensor([0.0, 0.02])}
    assert bench_step.unlike(row, near, theirs, START) is None
    assert bench_step.unlike(row, {"logprobs": START}, theirs, START) == (
        "it disagrees with TRL PPO: their policies are 100.0% apart of what that one learned"
    )
    assert bench_step.unlike(replace(row, learned=False), {"logprobs": START}, theirs, START) is None
    assert bench_step.unlike(row, {"logprobs": START}, {"logprobs": START}, START) is not None  # neither learned


FAILED = {"problem": "out of memory"}
NOT_COMPARED = "not compared: TRL PPO: out of memory"


@pytest.mark.parametrize(
    ("mine", "theirs", "said"),
    [
        ([answer()] * 2, [answer()] * 2, None),
        ([answer()], [], "not compared: TRL PPO: it was not run"),
        ([answer()] * 2, [answer(), FAILED], NOT_COMPARED),
        ([answer(), FAILED], [answer()] * 2, "out of memory"),
        ([answer(()), answer(())], [answer(())] * 2, "not compared: metrics of 0 iterations"),
        ([answer()], [answer([FINE] * 2)], "not compared: metrics of 1 iterations, and of 2 from TRL PPO"),
        ([answer()], [answer([{"reward": 0.5}])], "not compared: no kl from TRL PPO"),
        ([answer(), answer([{**FINE, "kl": 0.1}])], [answer()] * 2, "kl of iteration 0 is 0.1, not 0"),
        ([answer(), answer(moved=2.0)], [answer()] * 2, "100.0% apart"),
        ([answer(), answer(response=6)], [answer()] * 2, "it learned from other responses than TRL PPO"),
        ([{k: v for k, v in answer().items() if k != "logprobs"}], [answer()], "learned is not known"),
    ],
)
def test_the_gate_closes_on_what_is_not_compared(
    mine: list[dict[str, Any]], theirs: list[dict[str, Any]], said: str | None
) -> None:
    """In every turn, not in the first one alone; a third row that must be like the one that is shut out is, too."""
    rows = (TRL, Row(provider="tppo_fast: a", like="TRL PPO"), Row(provider="tppo_fast: b", like="tppo_fast: a"))
    found = {"tppo_fast: a": mine, "tppo_fast: b": mine, **({"TRL PPO": theirs} if theirs else {})}
    problems = bench_step.judged(rows, found, START)
    if said is None:
        assert set(problems.values()) == {None}
    else:
        assert said in (problems["tppo_fast: a"] or "")
        assert problems["tppo_fast: b"]


def test_a_failed_peer_closes_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is held to one that did not run leaves no time, in the results as in the record."""
    real = bench_step.answer_of

    def answer_of(row: Row, *given: Any) -> dict[str, Any]:
        return FAILED if row.name == "TRL PPO" else real(row, *given)

    monkeypatch.setattr(bench_step, "answer_of", answer_of)
    outcome = bench_step.run(Options(quick=True, scratch=tmp_path, providers=["padded PyTorch"]))
    assert {row.provider: row.problem for row in outcome.results if "vLLM" not in row.provider} == {
        "TRL PPO": "out of memory", "tppo_fast: own critic": NOT_COMPARED, "padded PyTorch": NOT_COMPARED,
        "tppo_fast: shared body": None, "padded PyTorch: shared body": None,
    }  # fmt: skip
    assert not [row for row in outcome.results if row.problem and row.values]


def test_a_driver_is_compared_by_its_entry_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    twin = replace(providers.named("TRL PPO"), name="Twin")
    monkeypatch.setattr(providers, "PROVIDERS", (*providers.PROVIDERS, twin))
    shape = {"prompts": 3, "new_tokens": 5}
    outcome = bench_step.run(Options(quick=True, scratch=tmp_path, providers=["Twin"], shape=shape))
    case = "PPO iteration against Twin, small Llama, 3 prompts of 24, 4 responses of 5"
    whole_step = {row.provider: row for row in outcome.results if row.case == case}
    assert [row.problem for row in outcome.results] == [None] * 8
    assert whole_step["Twin"].ratio == 1.0
    assert whole_step["tppo_fast: own critic"].ratio
    assert outcome.settings["shape"] == shape
    assert outcome.settings[case]["sizes"]["microbatch"] == 4


def test_some_providers_run_with_ours_and_what_rows_must_be_like(tmp_path: Path) -> None:
    def plan(*names: str) -> dict[str, set[str]]:
        options = Options(quick=True, scratch=tmp_path, providers=names or None)
        return {c.title: {row.name for row in c.rows} for c in comparisons(options)}

    assert plan("TRL PPO") == {"PPO iteration": {"TRL PPO", "tppo_fast", "padded PyTorch"}}
    assert plan("TRL GRPO") == {"GRPO iteration": {"TRL GRPO", "tppo_fast"}}
    assert plan("tppo_fast") == plan()
    with pytest.raises(UserError, match=r"--providers 'verl trainer': it has no row in step, for its Ray workers"):
        plan("TRL PPO", "verl trainer")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "step", "--quick", "--providers", "OpenRLHF trainer"], "it has no row in step"),
        (["--suite", "step", "--quick", "--microbatch", "3"], "--microbatch 3: it must divide the 8 responses"),
        (["--suite", "ops", "--prompt-tokens", "9"], "--prompt-tokens is a size of the step suite"),
    ],
)
def test_what_the_step_suite_cannot_do_is_one_sentence(tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = CliRunner().invoke(runner.main, [*words, "--model", str(tmp_path), "--scratch", str(tmp_path / "scratch")])
    assert done.exit_code == 2
    assert said in done.output


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


def test_trl_needs_one_pass_of_the_policy_less_to_prepare(tmp_path: Path) -> None:
    """Old log-probabilities are its generate's scores: reference and critic alone read the responses."""
    work = works(Options(quick=True, scratch=tmp_path))[0]
    theirs, ours = (gpu_step.needed_flops(row, work) for row in (TRL, replace(TRL, provider="tppo_fast: own critic")))
    lm = AutoModelForCausalLM.from_pretrained(work.model)
    size = 8 * 28, 8 * (28 * 29 // 2), 8 * 4
    policy = flops.costs(lm.base_model, lm.get_output_embeddings())
    assert theirs["prepare"] == policy.forward(*size) + flops.costs(lm.base_model).forward(*size)
    assert ours["prepare"] - theirs["prepare"] == pytest.approx(policy.forward(*size))
    assert ours["update"] == theirs["update"]


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
