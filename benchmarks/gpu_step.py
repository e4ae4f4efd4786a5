"""One PPO step at Qwen3-1.7B's shape, random weights: tppo_fast, each of its levers off in turn, and TRL's trainer.

Every row is a process of its own with fp32 master weights and bf16 arithmetic (TRL's reference is kept in bf16). Each trainer
gets microbatches of 4 to 6 thousand tokens: TRL, and we where prompts are not shared, 8 responses, else 64; rows of ours that
say so take all 128 at once. One has twice the prompts, so that the optimizer's time is shared by twice the tokens: another
step, in cases of its own. The rows' share of the ceiling is what the step needs (``tppo_fast.flops``: nothing recomputed, no
padding, no logits of prompts, a prompt once where it is shared) over the time and the GEMM rate measured in the same run. MFU
in the usual sense divides by the datasheet's rate instead, as the trainer's ``perf/update_mfu`` does: ``update, MFU``. TRL's
prepare needs one pass of the policy less: it takes old log-probabilities from generate's scores. Tokens per second are the
sampled ones, which all trainers count alike. Memory is the allocator's whole peak, weights and optimizer
included. TRL leaves gradient checkpointing off whatever its setting says, since its PPO has a training loop of its own.

Our rows of the same step must agree with the first one to 5 %, which bf16 allows; TRL learns from what it samples itself, and
its losses are held to ours in the step suite, in fp32.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.bench_step import answer_of, disagreement
from benchmarks.results import LEFT_OUT, Options, Result, summarise
from benchmarks.step_work import ALL_OFF, OWN, SHARED, TRL, UNSHARED_PROMPTS, Row, Work, inputs
from tppo_fast import flops, scratch
from tppo_fast.atomic import atomic_folder

QWEN3 = {
    "model_type": "qwen3", "hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "intermediate_size": 6144, "vocab_size": 151_936, "tie_word_embeddings": True,
    "max_position_embeddings": 40_960,
}  # fmt: skip
TINY = QWEN3 | {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "intermediate_size": 64, "vocab_size": 600}
RECOMPUTED = {"model": {"shared_body": True, "gradient_checkpointing": True}}
COMPILED = {"model": {"shared_body": True, "compile": True}}
HALF = COMPILED | {"ppo": {"optimizer": "adamw8bit", "weights": "bfloat16"}}
OWN_COMPILED = {"model": {"shared_body": False, "compile": True, "gradient_checkpointing": True}}
SDPA = {"model": {"shared_body": True, "attention": "sdpa"}}
NEEDED = {"TRL PPO": 130.0, "8-bit": 160.0, "compile": 110.0}
"""Seconds that a row takes, by its name, for torchao's kernels or for compiling; one that has fewer left does not start. 75 where
nothing is said."""
LARGE = ("TRL PPO", "tppo_fast: own critic", "tppo_fast: all levers off")
"""What does not fit in the 80 GB of an A100 or H100."""
LIKE: dict[str, Any] = {"like": "tppo_fast: shared body", "metrics": ("value_loss", "entropy")}
LEAN = Row(provider="tppo_fast: shared body", changes={"settings": SHARED, "microbatch": 64})
LARGER = Row(provider="tppo_fast: compiled, one microbatch", changes={"settings": COMPILED, "microbatch": 256})
"""The row with twice the prompts."""
OTHERS = (  # in two parts, by turns: TRL's has the rows that its memory is compared with
    Row(provider="tppo_fast: compiled, one microbatch", changes={"settings": COMPILED, "microbatch": 128}, **LIKE),
    LARGER,
    replace(TRL, changes={"microbatch": 8}),
    Row(provider="tppo_fast: prompts not shared", changes={"settings": UNSHARED_PROMPTS, "microbatch": 8}, **LIKE),
    Row(provider="tppo_fast: own critic", changes={"settings": OWN, "microbatch": 64}, first=True, **LIKE),
    Row(
        provider="tppo_fast: all levers off", changes={"settings": ALL_OFF, "microbatch": 8, "row_local": False},
        first=True, **LIKE,
    ),
    Row(
        provider="tppo_fast: own critic, compiled, activations recomputed",
        changes={"settings": OWN_COMPILED, "microbatch": 64}, first=True, **LIKE,
    ),
    Row(
        provider="tppo_fast: compiled, one microbatch, 8-bit optimizer, bf16 weights",
        changes={"settings": HALF, "microbatch": 128}, **LIKE,
    ),
    Row(provider="tppo_fast: attention by SDPA", changes={"settings": SDPA, "microbatch": 64}, **LIKE),
    Row(provider="tppo_fast: activations recomputed", changes={"settings": RECOMPUTED, "microbatch": 64}, **LIKE),
    Row(provider="tppo_fast: compiled", changes={"settings": COMPILED, "microbatch": 64}, **LIKE),
    Row(provider="tppo_fast: head at 4 GEMMs", changes={"settings": SHARED, "microbatch": 64, "row_local": False}, **LIKE),
)  # fmt: skip


def run(
    gemm: float,
    folder: Path,
    *,
    part: int,
    parts: int,
    deadline: float,
    extra_path: Sequence[str] = (),
    dry: bool = False,
    keep: Callable[[Sequence[Result]], object] = len,
) -> list[Result]:
    """The suite's rows; those that the time is over for say so.

    Args:
        gemm: measured FLOP/s of a bf16 GEMM.
        folder: where the model and the processes' files go.
        part, parts: see ``rows_of``.
        deadline: of ``time.monotonic()``; what could not end before it does not start.
        extra_path: where peers were installed.
        dry: a tiny shape on the CPU, in this process where it is ours.
        keep: called with all results so far after every row.
    """
    work = Work(
        name="Qwen3-1.7B shape", model=_model(folder, TINY if dry else QWEN3), prompts=2 if dry else 16,
        prompt_tokens=24 if dry else 512, samples=8, new_tokens=4 if dry else 32, epochs=1, iterations=2 if dry else 4,
        rounds=1, microbatch=8,
    )  # fmt: skip
    if torch.cuda.is_available():  # the rows' processes need what this one has kept
        gc.collect()
        torch.cuda.empty_cache()
    options = Options(scratch=folder, quick=dry, threads=1 if dry else 8)
    larger = replace(work, prompts=2 * work.prompts)
    answers, found = {}, []
    for row in rows_of(part, parts, dry=dry):
        step = larger if row is LARGER else work
        if time.monotonic() + (0.0 if dry else _seconds_needed(row)) > deadline:
            found += _results(row, step, {"problem": LEFT_OUT}, gemm)
            print(f"{row.provider}: {LEFT_OUT}", flush=True)
            keep(found)
            continue
        request, tensors = (
            step.request(options.threads, bfloat16=not dry, **row.changes),
            inputs(step, 0, responses=True),
        )
        answer = answer_of(row, request, tensors, options, extra_path=extra_path, timeout=deadline - time.monotonic())
        answers[row.provider] = answer
        if "problem" not in answer and row.like:
            wrong = disagreement(row, answer, answers[row.like], tolerance=0.05)  # bf16's rounding
            failed = f"{row.like}, which it must agree with, failed" if "problem" in answers[row.like] else None
            answer |= {"problem": failed or wrong} if failed or wrong else {}
        found += _results(row, step, answer, gemm)
        print(f"{row.provider}: {answer.get('problem') or 'done'}", flush=True)
        summarise(found)
        keep(found)
    return found


def rows_of(part: int, parts: int, *, dry: bool) -> list[Row]:
    """The lean loop and every ``parts``-th of the others."""
    others = [row for row in OTHERS if not (dry and _compiles(row))]  # a minute, on a CPU
    chosen = [LEAN, *others[part - 1 :: parts]]
    if dry or torch.cuda.get_device_properties(0).total_memory > 100 * 2**30:
        return chosen
    print(
        f"left out, since this GPU has less than 100 GiB: {', '.join(r.provider for r in chosen if r.provider in LARGE)}"
    )
    return [row for row in chosen if row.provider not in LARGE]


def _compiles(row: Row) -> bool:
    return row.changes.get("settings", {}).get("model", {}).get("compile", False)


def _seconds_needed(row: Row) -> float:
    kind = "8-bit" if "8-bit" in row.provider else "compile" if _compiles(row) else row.provider
    return NEEDED.get(kind, 75.0)


def _model(folder: Path, shape: dict[str, Any]) -> Path:
    """Random weights on disk, in bf16, with a tokenizer that nobody reads."""
    config = AutoConfig.for_model(**shape)
    path = folder / f"model-{shape['hidden_size']}"
    if not (path / "config.json").exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        tokenizer = scratch.byte_bpe(["a search session"])
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        with atomic_folder(path) as temporary:
            lm.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    return path


def _results(row: Row, work: Work, answer: dict[str, Any], gemm: float) -> list[Result]:
    """Tokens per second, and each phase; the first iteration warmed up."""
    sampled = work.prompts * work.samples * work.new_tokens
    iterations = [] if "problem" in answer else answer["iterations"][1:]
    needed = needed_flops(row, work)

    def result(what: str, unit: str, values: list[float], peak: float | None = None) -> Result:
        return Result(
            case=f"PPO step, {work.label}, {what}", provider=row.provider, family="PPO step", sizes=work.sizes, unit=unit,
            values=values, problem=answer.get("problem"), baseline=row.baseline,
            device_peak_bytes=None if peak is None else int(peak * 2**30),
        )  # fmt: skip

    both = [sampled / (i["prepare_seconds"] + i["update_seconds"]) for i in iterations]
    found = [result("sampled tokens through prepare and update", "tokens/s", both)]
    for phase in ("update", "prepare"):
        seconds = [i[f"{phase}_seconds"] for i in iterations]
        peak = max((i[f"{phase}_peak_gib"] for i in iterations), default=None)
        found.append(result(phase, "s", seconds, peak))
        if seconds:
            found[-1].share_of_ceiling = needed[phase] / statistics.median(seconds) / gemm
    if torch.cuda.is_available():
        peak_rate = flops.peak_rate(torch.device("cuda"), torch.bfloat16)
        mfu = [needed["update"] / i["update_seconds"] / peak_rate for i in iterations]
        found.append(result("update, MFU", "MFU", mfu))
    return found


def needed_flops(row: Row, work: Work) -> dict[str, float]:
    """What the row's way of doing a step needs, phase by phase: ``tppo_fast.flops``, on a model without storage."""
    model = row.changes.get("settings", ALL_OFF)["model"]  # TRL has a critic's body and shares nothing
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(work.model))
    policy = flops.costs(lm.base_model, lm.get_output_embeddings())
    critic = None if model["shared_body"] else flops.costs(lm.base_model)
    length, responses = work.prompt_tokens + work.new_tokens, work.prompts * work.samples
    tokens, pairs = responses * length, responses * _causal(length)
    if model.get("share_prompts", True):
        spared = responses - work.prompts  # readings of a prompt
        tokens, pairs = tokens - spared * work.prompt_tokens, pairs - spared * _causal(work.prompt_tokens)
    size = tokens, pairs, responses * work.new_tokens
    return {
        "prepare": (1 if row.name == TRL.name else 2) * policy.forward(*size)
        + (critic.forward(*size) if critic else 0.0),
        "update": policy.training(*size) + (critic.training(*size) if critic else 0.0),
    }


def _causal(length: int) -> int:
    return length * (length + 1) // 2
