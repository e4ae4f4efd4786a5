"""What a run logs, and where: one JSON line per step, TensorBoard, and W&B when asked. Every name is defined here."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tppo_fast.atomic import write_atomic
from tppo_fast.errors import UserError

METRICS_FILE = "metrics.jsonl"

GLOSSARY: dict[str, str] = {
    "rollout/reward_mean": "Mean over responses of the summed reward, before any KL penalty, in reward units.",
    "rollout/reward_std": "Standard deviation of the summed reward over the step's responses, in reward units.",
    "rollout/reward_per_token": "Mean reward of a sampled token, in reward units per token.",
    "rollout/length_mean": "Mean response length, in tokens, the end-of-sequence token included.",
    "rollout/truncated_share": "Share of responses cut at rollout.max_new_tokens, from 0 to 1.",
    "rollout/token_reward_mean": "Mean over responses of relevant minus irrelevant tokens: one scale for every algorithm.",
    "rollout/token_reward_std": "Standard deviation over the step's responses of relevant minus irrelevant tokens.",
    "rollout/relevant_share": "Share of relevant tokens (class 2) among those of class 1 or 2, from 0 to 1.",
    "rollout/repeated_share": "Mean share of a response's queries that repeat an earlier one of it, from 0 to 1.",
    "rollout/copied_share": "Mean share of a response's queries that stand in the history, from 0 to 1.",
    "rollout/canonical_share": "Tokens that the tokenizer itself needs for the sampled texts, divided by the tokens sampled for "
    "them, special ones left out of both: about 1; less where a policy spells words in more pieces.",
    "rollout/tokens": "Sampled tokens in the step, a count.",
    "rollout/staleness": "Steps by which the policy that sampled is older than the one that learns, a count.",
    "ppo/policy_loss": "Clipped policy objective, negated, in advantage units per token.",
    "ppo/value_loss": "Half the critic's squared error, clipped by ppo.value_clip, in squared reward units per token.",
    "ppo/kl_loss": "KL to the reference policy by the loss term's estimator (ppo.kl_estimator), in nats per token.",
    "ppo/entropy": "Entropy of the policy's next-token distribution, in nats per token.",
    "ppo/ratio": "Mean ratio of the new to the old policy's probabilities before each optimizer step, without unit; at first 1.",
    "ppo/approx_kl": "Estimate (k3) of the KL from the old to the new policy before each optimizer step, in nats per token.",
    "ppo/clip_low": "Share of tokens with a negative advantage and a ratio below 1 - ppo.clip_low, from 0 to 1.",
    "ppo/clip_high": "Share of tokens with a positive advantage and a ratio above 1 + ppo.clip_high, from 0 to 1.",
    "ppo/dual_clip": "Share of tokens whose loss was bounded by ppo.dual_clip, from 0 to 1.",
    "ppo/value_clip": "Share of tokens whose value loss was the clipped one, from 0 to 1.",
    "ppo/ess": "Effective sample size of the ratio, (sum r)^2 / (A sum r^2), as a share of the actions, from 0 to 1.",
    "ppo/grad_norm": "Global norm of the policy's gradient before clipping, mean over optimizer steps.",
    "ppo/critic_grad_norm": "Global norm of the critic's gradient before clipping, mean over optimizer steps.",
    "ppo/lr": "Learning rate of the policy at the step's last optimizer step, without unit.",
    "ppo/kl_coef": "Coefficient of the KL penalty in this step, in reward units per nat.",
    "ppo/kl": "KL of the old policy (the ratio's denominator) to the reference policy, estimator k1, in nats per token.",
    "ppo/advantage_mean": "Mean advantage before whitening, in reward units (grpo, bot-grpo: without unit).",
    "ppo/advantage_std": "Standard deviation of the advantage before whitening, in reward units (grpo, bot-grpo: without unit).",
    "ppo/return_mean": "Mean regression target of the critic, in reward units.",
    "ppo/value_mean": "Mean value predicted before the update, in reward units.",
    "ppo/explained_variance": "1 - Var(return - value) / Var(return) before the update: 1 perfect, 0 a constant.",
    "ppo/epochs_done": "Optimizer steps taken before ppo.target_kl ended them, in passes over the batch.",
    "ppo/microbatches": "Forward-backward passes of the step, a count.",
    "fit/loss": "The supervised objective of the step: SFT in nats per response token, DPO in nats per pair.",
    "fit/grad_norm": "Global norm of the gradient before clipping.",
    "fit/lr": "Learning rate of the step, without unit.",
    "fit/tokens": "Response tokens in the step's loss, a count.",
    "dpo/accuracy": "Share of pairs whose true queries have the larger implicit reward, from 0 to 1.",
    "dpo/margin": "Implicit reward of the true queries minus that of the own output, beta log-ratios, in nats.",
    "dpo/chosen_reward": "Implicit reward of the true queries, beta (log pi - log pi_ref) of the response, in nats.",
    "dpo/rejected_reward": "Implicit reward of the policy's own output, beta (log pi - log pi_ref), in nats.",
    "parity/mean": "Mean of |engine - trainer| over the log-probabilities of the sampled tokens, in nats.",
    "parity/max": "Largest |engine - trainer| over the log-probabilities of the sampled tokens, in nats.",
    "parity/share_above_0.1": "Share of sampled tokens with |engine - trainer| above 0.1 nats, from 0 to 1.",
    "parity/ess": "Effective sample size of trainer / engine probabilities, as a share of the actions, from 0 to 1.",
    "eval/loss": "The supervised objective on held-out sessions: SFT in nats per response token, DPO in nats per pair.",
    "eval/perplexity": "exp of the negative log-likelihood per response token of the held-out true queries, without unit.",
    "eval/relevance": "Share of the num_queries slots filled with a new, relevant and unrepeated query, from 0 to 1.",
    "eval/relevance_low": "Lower end of the 95 % bootstrap interval of eval/relevance over users, from 0 to 1.",
    "eval/relevance_high": "Upper end of the 95 % bootstrap interval of eval/relevance over users, from 0 to 1.",
    "eval/hit": "Share of held-out sessions with a true next query in the response's slots, from 0 to 1.",
    "eval/hit_1": "Share of held-out sessions whose response starts with a true next query, from 0 to 1.",
    "eval/mrr": "Mean of 1 / rank of the response's first true next query (0 without one), from 0 to 1.",
    "eval/exact": "Share of a response's queries that equal a true next query after normalisation, from 0 to 1.",
    "eval/word_relevance": "Share of the generated words that the lexical labeller calls relevant, from 0 to 1.",
    "eval/distinct": "Share of distinct queries among the queries of a response, from 0 to 1.",
    "eval/distinct_1": "Share of distinct words among the words of a response, from 0 to 1.",
    "eval/distinct_2": "Share of distinct pairs of adjacent words among all such pairs of a response, from 0 to 1.",
    "eval/valid": "Share of responses that hold exactly data.num_queries queries, from 0 to 1.",
    "eval/copy": "Share of a response's queries that stand in the history, from 0 to 1.",
    "eval/reward_mean": "Mean over responses to held-out sessions of the summed reward (reward.held_out), in reward units.",
    "eval/length": "Mean length of the responses to held-out sessions, in tokens.",
    "eval/truncated": "Share of responses to held-out sessions cut at rollout.max_new_tokens, from 0 to 1.",
    "time/rollout": "Sampling the step's responses, in seconds; with rollout.staleness beside an earlier step.",
    "time/rollout_wait": "What the step waited for its responses, in seconds.",
    "time/sync": "Publishing the policy's weights to the rollout engine, in seconds.",
    "time/offload": "Moving what rollouts can do without off the GPU and back (ppo.offload, vllm.sleep), in seconds.",
    "time/score": "Rewarding and packing the step's responses, in seconds.",
    "time/prepare": "Log-probabilities, values and advantages before the update, in seconds.",
    "time/update": "All optimizer steps of the step, in seconds.",
    "time/eval": "Evaluation on held-out sessions, in seconds.",
    "time/step": "The whole step, evaluation and checkpoint left out, in seconds.",
    "perf/tokens_per_second": "Sampled tokens of the step divided by time/step, in tokens per second.",
    "perf/rollout_tokens_per_second": "Sampled tokens divided by time/rollout, in tokens per second.",
    "perf/prepare_tokens": "Tokens that the policy read in prepare, prompts included, a count.",
    "perf/update_tokens": "Tokens that the policy read in the update, prompts included and each pass counted, a count.",
    "perf/prepare_tokens_per_second": "perf/prepare_tokens divided by time/prepare, in tokens per second.",
    "perf/update_tokens_per_second": "perf/update_tokens divided by time/update, in tokens per second.",
    "perf/prepare_tflop": "Arithmetic that prepare needs by the models' formulas (tppo_fast.flops), in 1e12 operations.",
    "perf/update_tflop": "Arithmetic that the update needs, gradients included and recomputation not, in 1e12 operations.",
    "perf/prepare_mfu": "perf/prepare_tflop per second as a share of the device's peak (tppo_fast.flops), from 0 to 1.",
    "perf/update_mfu": "perf/update_tflop per second as a share of the device's peak (tppo_fast.flops), from 0 to 1.",
    "perf/padding_waste": "Share of the positions computed in the update that held padding or a shared prompt's tokens "
    "again, from 0 to 1.",
    "reward_model/loss": "Training loss of the reward model, the weighted sum of the two below, without unit.",
    "reward_model/local_loss": "Class-weighted cross-entropy of a step's valid response tokens, in nats per token.",
    "reward_model/global_loss": "Squared error of a response's mean soft value against 1 + its sentence label, per response.",
    "reward_model/grad_norm": "Global norm of the reward model's gradient before clipping.",
    "reward_model/validation_loss": "The loss on the validation users, every response token valid, without dropout.",
    "reward_model/accuracy": "Share of response tokens whose likeliest class is their label, from 0 to 1.",
    "reward_model/macro_f1": "Mean over the classes that occur of 2 TP / (2 TP + FP + FN), over response tokens, from 0 to 1.",
    "reward_model/auc": "Probability that a relevant token scores higher than an irrelevant one; its score is "
    "P(relevant) / (P(relevant) + P(irrelevant)).",
    "reward_model/calibration_error": "Mean over words' tokens of |score - share relevant| in 10 equal bins of that score.",
    "reward_model/sentence_auc": "Probability that a response labelled relevant has a higher mean soft value, each "
    'token weighted by 1 - P(separator) as reward.placement = "sentence" does, than one labelled irrelevant.',
    "perf/peak_memory_gib": "Peak memory since the run began, of the (first) GPU, or of the (first) process on a CPU, in GiB.",
}
"""Every metric a run may log, with its unit. ``MetricsLogger.log`` refuses a name that is not defined here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One recording of a metric."""

    samples: int
    """Responses that the run had learned from."""
    seconds: float
    """It had trained, evaluations left out."""
    value: float
    """NaN where it was not finite."""


def recorded(rows: Sequence[Mapping[str, Any]], name: str, samples_per_step: int) -> list[Point]:
    """Where a metric was recorded, of the rows of ``read_metrics``."""
    points, seconds = [], 0.0
    for row in rows:
        seconds += row.get("time/step") or 0.0
        if name in row:
            value = math.nan if row[name] is None else float(row[name])
            points.append(Point(samples=row["step"] * samples_per_step, seconds=round(seconds, 3), value=value))
    return points


def read_metrics(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of ``run_dir/metrics.jsonl``, one per step in order of first appearance; a null value is None.

    Rows of the same step are merged, the later value winning. A last line cut short by a kill is left out.

    Raises:
        UserError: the file cannot be read, or a line other than the last is damaged.
    """
    path = Path(run_dir) / METRICS_FILE
    merged: dict[int, dict[str, Any]] = {}
    for row in _rows(path):
        merged.setdefault(row["step"], {}).update(row)
    return list(merged.values())


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows as written. ``metrics.jsonl`` is appended to a line at a time, so only its last line can be cut."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(
            f"{str(path)!r} cannot be read ({error.strerror}): give the folder of a run that logged"
        ) from None
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            raise UserError(f"{str(path)!r} line {number} is not a metrics row: remove that line, or use a new run_dir")
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # bad JSON or bad UTF-8
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


class MetricsLogger:
    """Writes each step's metrics to ``run_dir/metrics.jsonl``, TensorBoard (``run_dir/tensorboard``) and W&B.

    ``start_step`` is the last step the run keeps. Whatever was logged after it by an interrupted run is removed first
    (hidden in TensorBoard; W&B ignores a step it has seen), so that nothing is counted twice.

    Raises:
        UserError: run_dir cannot be written, its metrics.jsonl is damaged, or W&B is asked for and cannot start.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        start_step: int = 0,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        config: Mapping[str, Any],
    ) -> None:
        self.run_dir = Path(run_dir)
        path = self.run_dir / METRICS_FILE
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            continued = path.exists()
            self._wandb = _wandb_run(self.run_dir, wandb_project, continued, config) if wandb_project else None
            kept = [row for row in _rows(path) if row["step"] <= start_step] if continued else []
            write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
            self._file = path.open("ab")
        except OSError as error:
            raise UserError(
                f"run_dir {str(self.run_dir)!r} cannot be written ({error.strerror}): choose another"
            ) from None
        self._board = _board(self.run_dir, start_step, config) if tensorboard else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one row. Values that are not finite become null in the file and are left out elsewhere.

        Raises:
            ValueError: a name is neither in ``GLOSSARY`` nor under ``custom/``, for a user's own loss.
        """
        if unknown := [name for name in metrics if name not in GLOSSARY and not name.startswith("custom/")]:
            raise ValueError(f"metric {unknown[0]!r} has no definition: add it to tppo_fast.metrics.GLOSSARY")
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line = json.dumps({"step": int(step), **{name: finite.get(name) for name in values}}, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        if self._board is not None:
            for name, value in finite.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def close(self) -> None:
        """Close every file; a second call does nothing."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._board = self._wandb = None

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _board(run_dir: Path, start_step: int, config: Mapping[str, Any]) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # seconds to import, and not every run wants it

    writer = SummaryWriter(run_dir / "tensorboard", purge_step=start_step + 1)  # hides earlier events from there on
    writer.add_text("config", f"```json\n{json.dumps(config, indent=2, default=str)}\n```", start_step)
    return writer


def _wandb_run(run_dir: Path, project: str, continued: bool, config: Mapping[str, Any]) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"train.wandb_project = {project!r} needs the wandb package ({error}): "
            "pip install wandb, or remove train.wandb_project"
        ) from None
    id_file = run_dir / "wandb_id"  # a resumed run continues its own W&B run
    run_id = id_file.read_text().strip() if continued and id_file.exists() else uuid.uuid4().hex
    try:
        run = wandb.init(project=project, id=run_id, resume="allow", dir=str(run_dir), config=dict(config))
    except wandb.Error as error:
        raise UserError(
            f"train.wandb_project = {project!r}: W&B could not start ({' '.join(str(error).split())}): "
            "run wandb login, or set WANDB_MODE=offline, or remove train.wandb_project"
        ) from None
    write_atomic(id_file, run_id.encode())
    return run
