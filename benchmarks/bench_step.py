"""Whole PPO iterations: tppo_fast against TRL's PPO and GRPO trainers, and with each of its levers off in turn.

    python -m benchmarks --suite step --threads 2

Every provider is a process of its own, they take turns, and get the same prompts, number of samples, response length (the
end-of-sequence token is forbidden), epochs, optimizer and fp32 weights. All sample by transformers' generate, in ours (and in
the padded baseline) after a prefill that the samples of a prompt share; what vLLM changes stands in rows of its own, since
TRL's PPO trainer cannot use it. The first to sample decides the responses: what the others sample is only timed, and they learn
from the same ones. Hence the gate: reward, KL, losses and entropy of every iteration must agree (GRPO: reward and entropy), and
so must what the policy learned, the change in the log-probability of each response; no time is kept where they do not.

What differs: TRL's critic is a body of its own, as in "own critic"; "shared body" is our switch for one body, which trains
another function: it is held to the padded baseline with one body. TRL computes the logits of prompts, too. We keep a second
copy of the policy to sample from, as our trainer does. Gradients are not clipped, since TRL's are not. Memory of a whole
iteration is the peak of what the process had resident, its libraries included. With the real model one iteration is a turn:
nothing has warmed up, for anybody.

The levers are counted (FLOPs, peak of live bytes: ``counters``) and timed in one run each, whose clock the counter slows down
alike; their losses must agree.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from benchmarks import peer_envs
from benchmarks.drivers import ruler
from benchmarks.drivers.ruler import PHASES
from benchmarks.measure import from_place
from benchmarks.providers import answer_in, ask, chosen, named
from benchmarks.results import Options, Outcome, Result, summarise
from benchmarks.step_ours import run as run_here
from benchmarks.step_work import GRPO, LEVERS, Row, Work, inputs, whole, works
from tppo_fast import loading

ROOT = Path(__file__).parents[1]


def run(options: Options) -> Outcome:
    """The step suite: the real model first, in a table's first row.

    Raises:
        UserError: there is no model at ``options.model``, or a provider is unknown.
    """
    names = {provider.name for provider in chosen("step", options.providers)}
    asked, record = works(options), {"model": options.model.name}
    results: list[Result] = []
    for work in reversed(asked):
        small = work is asked[0]
        for title, rows in (("PPO iteration", whole(small=small)), ("GRPO iteration", GRPO)):
            fitting = [row for row in rows if small or not row.small_only]
            results += _compare(title, work, fitting, names, options, record) if fitting else []
    results += _compare("PPO levers", asked[-1], LEVERS, names, options, record, levers=True)
    summarise(results)
    return Outcome(results=results, settings=record)


def _compare(
    title: str, work: Work, rows: Sequence[Row], names: set[str], options: Options, record: dict[str, Any], *,
    levers: bool = False,
) -> list[Result]:  # fmt: skip
    """Every row of ``names``, ``options.rounds`` times in turns, as results, ours first; answers go into ``record``.

    ``levers``: counted instead, once, without sampling.
    """
    tensors, found = inputs(work, options.seed, responses=levers), {}
    one = {"count": True, "iterations": 1, "epochs": 1} if levers else {}
    taking_part = [row for row in rows if row.name in names]
    for turn in range(1 if levers else options.rounds or work.rounds):
        for row in from_place(taking_part, turn):
            request = work.request(options.threads, learned=turn == 0, **one, **row.changes)
            answer = answer_of(row, request, tensors, options)
            print(f"{title}, {work.name}, {row.provider}: {answer.get('problem') or _seconds(answer)}", flush=True)
            found.setdefault(row.provider, []).append(answer)
            if "sequences" in answer:
                tensors.setdefault("sequences", answer["sequences"])
    answers = {name: _merged(several) for name, several in found.items()}
    start = _start(work, tensors["sequences"][0 if levers else -1]) if "sequences" in tensors else None
    for row in rows:
        mine, other = answers.get(row.provider, {}), answers.get(row.like or "", {})
        if "problem" in mine or "problem" in other:
            continue
        if problem := disagreement(row, mine, other) or unlike(row, mine, other, start):
            mine["problem"] = problem
    record[f"{title}, {work.name}"] = {
        "sizes": {**work.sizes, "epochs": 1 if levers else work.epochs, "microbatch": work.microbatch},
        **{n: {k: v for k, v in a.items() if k not in ("sequences", "logprobs")} for n, a in answers.items()},
    }
    ordered = sorted((r for r in rows if r.provider in answers), key=lambda row: row.name != "tppo_fast")
    as_results = _counts if levers else _times
    return [r for row in ordered for r in as_results(title, work, row, answers[row.provider])]


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
    if problem := next((a["problem"] for a in answers if "problem" in a), None):
        return {"problem": problem}
    return {**answers[0], "iterations": [i for a in answers for i in a["iterations"][len(a["iterations"]) > 1 :]]}


def disagreement(row: Row, mine: Mapping[str, Any], other: Mapping[str, Any], tolerance: float = 1e-3) -> str | None:
    """The first metric that differs by more than ``tolerance``, relative, in any iteration (``row.first``), or None."""
    pairs = list(zip(mine.get("metrics", ()), other.get("metrics", ()), strict=False))
    for i, (a, b) in enumerate(pairs[:1] if row.first else pairs):
        for key in row.metrics:
            if not abs(a[key] - b[key]) <= tolerance * abs(b[key]) + 1e-5:
                return f"it disagrees with {row.like}: {key} of iteration {i} is {a[key]:.6g}, not {b[key]:.6g}"
    return None


def unlike(
    row: Row, mine: Mapping[str, Any], other: Mapping[str, Any], start: Tensor | None, tolerance: float = 5e-3
) -> str | None:
    """Says by how much the two policies moved apart, if by more than ``tolerance`` of the way the other one went; or None.

    ``start``: the log-probability of each response before training, [B].
    """
    if not row.learned or start is None or "logprobs" not in mine or "logprobs" not in other:
        return None
    way, apart = (other["logprobs"] - start).norm(), (mine["logprobs"] - other["logprobs"]).norm()
    if apart <= tolerance * way:
        return None
    return f"it disagrees with {row.like}: their policies are {apart / way:.1%} apart of what that one learned"


def _start(work: Work, sequences: Tensor) -> Tensor:
    """``ruler.final_logprobs`` of the policy before any step."""
    lm = loading.load_causal_lm(str(work.model))
    return ruler.final_logprobs(lm, sequences, {"learned": True, "new_tokens": work.new_tokens})["logprobs"]


def _times(title: str, work: Work, row: Row, answer: Mapping[str, Any]) -> list[Result]:
    """A result for the whole iteration and one for each phase."""
    if "problem" in answer:
        return [_result(title, work, row, "", problem=answer["problem"])]
    found = []
    for phase in ("whole", *PHASES):
        seconds, peaks = ([i[f"{phase}_{what}"] for i in answer["iterations"]] for what in ("seconds", "peak_gib"))
        what = "" if phase == "whole" else f", {phase}"
        found.append(_result(title, work, row, what, values=seconds, memory=max(peaks) * 2**30))
    return found


def _counts(title: str, work: Work, row: Row, answer: Mapping[str, Any]) -> list[Result]:
    """For each phase its FLOPs with the peak of its live bytes, and its seconds."""
    if "problem" in answer:
        return [_result(title, work, row, ", update FLOPs", unit="FLOP", problem=answer["problem"])]
    found = []
    for phase in ("update", "prepare"):
        flops, live = float(answer[f"{phase}_flops"]), answer[f"{phase}_live_bytes"]
        seconds = [i[f"{phase}_seconds"] for i in answer["iterations"]]
        found += [
            _result(title, work, row, f", {phase} FLOPs", unit="FLOP", values=[flops], memory=live),
            _result(title, work, row, f", {phase}, counted", values=seconds),
        ]
    return found


def _result(
    title: str, work: Work, row: Row, what: str, *, unit: str = "s", values: Sequence[float] = (),
    memory: float | None = None, problem: str | None = None,
) -> Result:  # fmt: skip
    case = f"{title}, {work.name}{what}"
    return Result(
        case=case, family=case, provider=row.provider, sizes=work.sizes, unit=unit, values=list(values), problem=problem,
        baseline=row.baseline, host_peak_bytes=None if memory is None else int(memory),
    )  # fmt: skip


def _seconds(answer: Mapping[str, Any]) -> str:
    last = answer["iterations"][-1]
    return ", ".join(f"{p} {last[f'{p}_seconds']:.2f} s" for p in PHASES if f"{p}_seconds" in last)
