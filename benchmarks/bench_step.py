"""Whole PPO iterations: tppo_fast against TRL's PPO and GRPO trainers, and with each of its levers off in turn.

    python -m benchmarks --suite step --threads 2

Every provider is a process of its own, they take turns, and get the same prompts, number of samples, response length (the
end-of-sequence token is forbidden), epochs, optimizer and fp32 weights. All sample by transformers' generate, in ours (and in
the padded baseline) after a prefill that the samples of a prompt share; what vLLM changes stands in rows of its own, since
TRL's PPO trainer cannot use it. The first to sample decides the responses: what the others sample is only timed, and they learn
from the same ones. Hence the gate: reward, KL, losses and entropy of every iteration must agree (GRPO: reward and entropy), and
so must what the policy learned, the change in the log-probability of each response. No time is kept where they do not in any
turn, nor where the row to agree with is not there or failed.

What differs: TRL's critic is a body of its own, as in "own critic"; "shared body" is our switch for one body, which trains
another function: see ``step_work.whole`` for what it is held to. TRL computes the logits of prompts, too; with the real model it
takes 8 responses a pass, as many as ours, and in a second row one, about as many tokens as ours. We keep a second copy of the
policy to sample from, as our trainer does. Gradients are not clipped, since TRL's are not. Memory of a whole iteration is the
peak of what the process had resident, its libraries included. The first iteration of a turn, before which Adam has no states,
is never kept; with the real model one turn of three iterations is all that the minutes allow.

The levers are counted (FLOPs, peak of live bytes: ``counters``) and timed in one run each, whose clock the counter slows down
alike; their losses must agree.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import peer_envs
from benchmarks.drivers import ruler
from benchmarks.drivers.ruler import PHASES
from benchmarks.measure import from_place
from benchmarks.providers import answer_in, ask, named
from benchmarks.results import Options, Outcome, Result, summarise
from benchmarks.step_ours import run as run_here
from benchmarks.step_work import Comparison, Row, Work, comparisons, inputs
from tppo_fast import loading

ROOT = Path(__file__).parents[1]


def run(options: Options) -> Outcome:
    """The step suite: the real model first, in a table's first row.

    Raises:
        UserError: there is no model at ``options.model``, a provider is unknown or has no row, or sizes do not fit.
    """
    record: dict[str, Any] = {"model": options.model.name, **({"shape": dict(options.shape)} if options.shape else {})}
    results: list[Result] = []
    for comparison in comparisons(options):
        results += _compare(comparison, options, record)
    summarise(results)
    return Outcome(results=results, settings=record)


def _compare(comparison: Comparison, options: Options, record: dict[str, Any]) -> list[Result]:
    """Every row, in turns, as results, ours first; answers go into ``record``."""
    work, rows, levers = comparison.work, comparison.rows, comparison.levers
    tensors, found = inputs(work, options.seed, responses=levers), {}
    one = {"count": True, "iterations": 1, "epochs": 1} if levers else {}
    for turn in range(1 if levers else options.rounds or work.rounds):
        for row in from_place(rows, turn):
            request = work.request(options.threads, learned=True, **one, **row.changes)
            answer = answer_of(row, request, tensors, options)
            print(f"{comparison.case}, {row.provider}: {answer.get('problem') or _seconds(answer)}", flush=True)
            found.setdefault(row.provider, []).append(answer)
            if "sequences" in answer:
                tensors.setdefault("sequences", answer["sequences"])
    start = _start(work, tensors["sequences"][0 if levers else -1]) if "sequences" in tensors else None
    problems = judged(rows, found, start)
    answers = {n: {"problem": problems[n]} if problems[n] else _merged(several) for n, several in found.items()}
    record[comparison.case] = {
        "sizes": {**work.sizes, "epochs": 1 if levers else work.epochs, "microbatch": work.microbatch},
        **{n: {k: v for k, v in a.items() if k not in ("sequences", "logprobs")} for n, a in answers.items()},
    }
    ordered = sorted(rows, key=lambda row: row.name != "tppo_fast")
    as_results = _counts if levers else _times
    return [r for row in ordered for r in as_results(comparison, row, answers[row.provider])]


def answer_of(
    row: Row, request: dict[str, Any], tensors: Mapping[str, Tensor], options: Options, *,
    extra_path: Sequence[str] = (), timeout: float = 3600,
) -> dict[str, Any]:  # fmt: skip
    """The row's answer, its sequences among it; or {"problem": why there is none}.

    ``extra_path``: where its imports lie, too. It is stopped after ``timeout`` seconds.
    """
    folder = options.scratch / f"step-{row.provider.replace(': ', '-').replace(' ', '-')}"
    peer = named(row.provider)
    try:
        if peer.environment and peer.driver:
            python = Path(sys.executable) if extra_path else peer_envs.python_of(peer.environment)
            if python is None:
                return {"problem": peer.missing()}
            given = {n: tensors[n] for n in ("prompts", "value_head")}
            answer = ask(
                python, peer.driver, folder, request, given, threads=options.threads, timeout=timeout, extra_path=extra_path
            )  # fmt: skip
        elif options.quick:
            answer, out = run_here(request, tensors)
            return answer | out
        else:
            answer = _own_process(request, tensors, folder, extra_path, timeout)
        return answer | load_file(folder / "outputs.safetensors")
    except Exception as error:  # the other rows go on
        return {"problem": " ".join(f"{type(error).__name__}: {error}".split())[-300:]}


def _own_process(
    request: dict[str, Any], tensors: Mapping[str, Tensor], folder: Path, extra_path: Sequence[str], timeout: float
) -> dict[str, Any]:
    """``step_ours`` in a process of its own."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *extra_path])
    settings = {"OMP_NUM_THREADS": str(request["threads"]), "PYTHONPATH": path}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.step_ours", folder.resolve()]
    return answer_in(folder, command, request, tensors, settings, timeout=timeout, cwd=ROOT)


def _merged(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A provider's rounds as one answer: metrics of the first; of several iterations the first one warmed up and is gone."""
    return {**answers[0], "iterations": [i for a in answers for i in a["iterations"][len(a["iterations"]) > 1 :]]}


def judged(
    rows: Sequence[Row], found: Mapping[str, Sequence[Mapping[str, Any]]], start: Tensor | None
) -> dict[str, str | None]:
    """Row -> why it has no time: it failed in a turn, disagrees in one with the row it must be like, or cannot be compared.

    Args:
        found: each row's answers, turn by turn.
        start: see ``unlike``.
    """

    @functools.cache
    def verdict(name: str) -> str | None:
        if problem := next((a["problem"] for a in found[name] if "problem" in a), None):
            return problem
        row = next(row for row in rows if row.provider == name)
        if row.like is None:
            return None
        if why := verdict(row.like) if row.like in found else "it was not run":
            return f"not compared: {row.like}: {why}"
        turns = zip(found[name], found[row.like], strict=True)
        return next((p for mine, other in turns if (p := _different(row, mine, other, start))), None)

    return {name: verdict(name) for name in found}


def _different(row: Row, mine: Mapping[str, Any], other: Mapping[str, Any], start: Tensor | None) -> str | None:
    if not torch.equal(mine["sequences"], other["sequences"]):
        return f"not compared: it learned from other responses than {row.like}"
    return disagreement(row, mine, other) or unlike(row, mine, other, start)


def disagreement(row: Row, mine: Mapping[str, Any], other: Mapping[str, Any], tolerance: float = 1e-3) -> str | None:
    """The first metric that differs by more than ``tolerance``, relative, in any iteration (``row.first``), or None."""
    ours, theirs = mine.get("metrics", ()), other.get("metrics", ())
    if not len(ours) == len(theirs) > 0:
        return f"not compared: metrics of {len(ours)} iterations, and of {len(theirs)} from {row.like}"
    pairs = list(zip(ours, theirs, strict=True))
    for i, (a, b) in enumerate(pairs[:1] if row.first else pairs):
        for key in row.metrics:
            if key not in a or key not in b:
                return f"not compared: no {key} from {row.provider if key not in a else row.like}"
            if not abs(a[key] - b[key]) <= tolerance * abs(b[key]) + 1e-5:
                return f"it disagrees with {row.like}: {key} of iteration {i} is {a[key]:.6g}, not {b[key]:.6g}"
    return None


def unlike(
    row: Row, mine: Mapping[str, Any], other: Mapping[str, Any], start: Tensor | None, tolerance: float = 5e-3
) -> str | None:
    """Says by how much the two policies moved apart, if by more than ``tolerance`` of the way the other one went; or None.

    ``start``: the log-probability of each response before training, [B].
    """
    if not row.learned:
        return None
    if start is None or "logprobs" not in mine or "logprobs" not in other:
        return f"not compared: what it and {row.like} learned is not known"
    way, apart = (other["logprobs"] - start).norm(), (mine["logprobs"] - other["logprobs"]).norm()
    if way > 0 and apart <= tolerance * way:
        return None
    return f"it disagrees with {row.like}: their policies are {apart / way:.1%} apart of what that one learned"


def _start(work: Work, sequences: Tensor) -> Tensor:
    """``ruler.final_logprobs`` of the policy before any step."""
    lm = loading.load_causal_lm(str(work.model))
    return ruler.final_logprobs(lm, sequences, {"learned": True, "new_tokens": work.new_tokens})["logprobs"]


def _times(comparison: Comparison, row: Row, answer: Mapping[str, Any]) -> list[Result]:
    """A result for the whole iteration and one for each phase."""
    if "problem" in answer:
        return [_result(comparison, row, "", problem=answer["problem"])]
    found = []
    for phase in ("whole", *PHASES):
        seconds, peaks = ([i[f"{phase}_{what}"] for i in answer["iterations"]] for what in ("seconds", "peak_gib"))
        what = "" if phase == "whole" else f", {phase}"
        found.append(_result(comparison, row, what, values=seconds, memory=max(peaks) * 2**30))
    return found


def _counts(comparison: Comparison, row: Row, answer: Mapping[str, Any]) -> list[Result]:
    """For each phase its FLOPs with the peak of its live bytes, and its seconds."""
    if "problem" in answer:
        return [_result(comparison, row, ", update FLOPs", unit="FLOP", problem=answer["problem"])]
    found = []
    for phase in ("update", "prepare"):
        flops, live = float(answer[f"{phase}_flops"]), answer[f"{phase}_live_bytes"]
        seconds = [i[f"{phase}_seconds"] for i in answer["iterations"]]
        found += [
            _result(comparison, row, f", {phase} FLOPs", unit="FLOP", values=[flops], memory=live),
            _result(comparison, row, f", {phase}, counted", values=seconds),
        ]
    return found


def _result(
    comparison: Comparison, row: Row, what: str, *, unit: str = "s", values: Sequence[float] = (),
    memory: float | None = None, problem: str | None = None,
) -> Result:  # fmt: skip
    case = f"{comparison.case}{what}"
    return Result(
        case=case, family=case, provider=row.provider, sizes=comparison.work.sizes, unit=unit, values=list(values),
        problem=problem, baseline=row.baseline, host_peak_bytes=None if memory is None else int(memory),
    )  # fmt: skip


def _seconds(answer: Mapping[str, Any]) -> str:
    last = answer["iterations"][-1]
    return ", ".join(f"{p} {last[f'{p}_seconds']:.2f} s" for p in PHASES if f"{p}_seconds" in last)
