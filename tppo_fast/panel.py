"""Several policies on the same held-out sessions: ``tppo-fast evaluate``, and the final table of ``compare``.

A policy trained with several seeds is one name with several folders: intervals then cover other seeds as well as other users.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from tppo_fast import evaluate, judging, loading
from tppo_fast.atomic import write_atomic
from tppo_fast.config import RunConfig
from tppo_fast.data.prompts import PromptBuilder
from tppo_fast.data.sessions import Session
from tppo_fast.data_types import Rollout
from tppo_fast.errors import UserError
from tppo_fast.estimates import Difference, Estimate, holm
from tppo_fast.evaluate import Scores
from tppo_fast.progress import Progress
from tppo_fast.rewards import Labeller, LexicalLabeller
from tppo_fast.rollout import build_engine
from tppo_fast.rollout.base import check_lengths
from tppo_fast.runs import eval_sampling, resolve_device, warn_of_other_prompts
from tppo_fast.words import normalise_query

COPY_LAST = "copy the last query"
EXTRA = {
    "judged": "Relevance rate: 1 when the judge calls the whole response relevant.",
    "similarity": "Cosine between each generated query and the nearest true next query, mean over the response.",
}
"""Metrics beside ``evaluate.METRICS``."""
Encode = Callable[[Sequence[str]], Mapping[str, np.ndarray]]
"""Texts -> text to unit vector."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judges:
    """Who judges responses."""

    labeller: Labeller
    """Judges a response alone: the relevance rate, and duels where there is no pair judge. No response is judged twice."""
    pair: judging.PairJudge | None = None
    """Compares two responses; asked in both orders."""
    encode: Encode | None = None
    """Sentence vectors for the similarity; None leaves it out."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "labeller", judging.once(self.labeller))


@dataclass(frozen=True, slots=True, kw_only=True)
class Duel:
    """One policy against another."""

    a: str
    b: str
    differences: dict[str, Difference]
    """Metric -> a - b, paired."""
    win: float
    """Share of pairs that a wins in both orders."""
    tie: float
    lose: float
    margin: Difference
    """Wins minus losses, paired. Not a difference of shares: a tie of two relevant responses goes to the one with the larger
    share of relevant words."""


@dataclass(slots=True, kw_only=True)
class Panel:
    """What every policy answered and how it scored."""

    users: list[str] = field(default_factory=list)
    """Who each of the B responses belongs to."""
    scores: dict[str, Scores] = field(default_factory=dict)
    """Policy -> metric -> [R, B], R runs."""
    rollouts: dict[str, list[list[Rollout]]] = field(default_factory=dict)
    """Policy -> run -> responses; empty for the copy-last row."""
    table: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    """Policy -> metric -> its mean and interval."""

    def duels(self, judges: Judges, seed: int = 0) -> list[Duel]:
        """Every pair of policies with equally many runs."""
        judge = judges.pair or judging.by_labels(judges.labeller)
        found = []
        for a, b in itertools.combinations(self.rollouts, 2):
            if len(self.rollouts[a]) != len(self.rollouts[b]):
                continue
            runs = zip(self.rollouts[a], self.rollouts[b], strict=True)
            results = np.stack([judging.duels(judge, one, two) for one, two in runs])
            found.append(
                Duel(
                    a=a,
                    b=b,
                    differences=differences(self.scores[a], self.scores[b], self.users, seed=seed),
                    win=float((results > 0).mean()),
                    tie=float((results == 0).mean()),
                    lose=float((results < 0).mean()),
                    margin=evaluate.paired_difference(results, np.zeros_like(results), self.users, seed=seed),
                )
            )
        return found


def differences(a: Scores, b: Scores, users: Sequence[str], *, seed: int) -> dict[str, Difference]:
    """Metric -> a - b, paired, of every metric that both have."""
    return {name: evaluate.paired_difference(a[name], b[name], users, seed=seed) for name in a if name in b}


def corrected(family: Mapping[str, Mapping[str, Difference]]) -> dict[str, dict[str, Difference]]:
    """Comparison -> metric -> difference, the p-values of each metric corrected for the number of comparisons."""
    by_metric = {
        metric: dict(zip(family, holm([row[metric] for row in family.values()]), strict=True))
        for metric in next(iter(family.values()), {})
    }
    return {name: {metric: rows[name] for metric, rows in by_metric.items()} for name in family}


def evaluate_policies(
    config: RunConfig,
    policies: Mapping[str, Sequence[Path]],
    sessions: Sequence[Session],
    judges: Judges,
    *,
    responses: int = 1,
) -> Panel:
    """Sample and score ``responses`` responses of each policy to each session; the copy-last row is always there.

    What can be known of a folder without its weights is asked of all of them before anything is sampled.

    Args:
        config: the ``seed``, ``data``, ``rollout``, ``vllm`` and ``device`` settings; its ``model.path`` is not used.
        policies: name -> its folders, one for each seed.
        sessions: held-out sessions.
        judges: who judges.
        responses: responses to each session.

    Raises:
        UserError: a folder holds no causal language model.
    """
    for folder in dict.fromkeys(itertools.chain.from_iterable(policies.values())):
        _check(config, folder, sessions)
    panel = Panel()
    answered: dict[Path, tuple[list[Rollout], PromptBuilder]] = {}
    total = sum(len(folders) for folders in policies.values())
    with Progress("evaluate", total, "policy") as progress:
        for name, folders in policies.items():
            runs = []
            for folder in folders:
                if folder not in answered:
                    answered = {
                        folder: respond(config, folder, sessions, responses)
                    }  # one policy may stand for many seeds
                rollouts, builder = answered[folder]
                runs.append(rollouts)
                panel.scores.setdefault(name, {})
                for metric, values in _score(rollouts, builder, config, judges).items():
                    panel.scores[name].setdefault(metric, np.empty((0, len(values))))
                    panel.scores[name][metric] = np.vstack([panel.scores[name][metric], values])
                progress.update(1, relevance=float(panel.scores[name]["relevance"][-1].mean()))
            panel.rollouts[name] = runs
    first = next(iter(panel.rollouts.values()))[0]
    panel.users = [rollout.prompt.user_id for rollout in first]
    panel.scores = {COPY_LAST: _copy_last(first, config, judges), **panel.scores}
    panel.table = {
        name: evaluate.summarise(scores, panel.users, seed=config.seed) for name, scores in panel.scores.items()
    }
    return panel


def _check(config: RunConfig, folder: Path, sessions: Sequence[Session]) -> None:
    """Refuse a folder whose config, tokenizer or prompts would end the evaluation when its turn comes."""
    trusted = config.model.trust_remote_code
    settings = loading.load_settings(str(folder), trust_remote_code=trusted)
    tokenizer = loading.load_tokenizer(str(folder), trust_remote_code=trusted)
    loading.check_vocabulary(f"model.path = {str(folder)!r}", tokenizer, settings.get_text_config().vocab_size)
    warn_of_other_prompts(folder, config.data)
    prompts = PromptBuilder(tokenizer, config.data).prompts(sessions)
    longest = max(len(prompt.token_ids) for prompt in prompts) + config.rollout.max_new_tokens
    try:
        check_lengths(longest, settings)
    except UserError as error:
        raise UserError(f"policy {str(folder)!r}: {error}") from None


def respond(
    config: RunConfig, folder: Path, sessions: Sequence[Session], responses: int
) -> tuple[list[Rollout], PromptBuilder]:
    """The responses of the policy in ``folder``, and the builder that parses them."""
    at = config.model_copy(update={"model": config.model.model_copy(update={"path": str(folder)})})
    lm, tokenizer = loading.load_policy(str(folder), trust_remote_code=config.model.trust_remote_code)
    builder = PromptBuilder(tokenizer, config.data)
    with contextlib.closing(build_engine(at, tokenizer, resolve_device(at.device))) as engine:
        engine.load_weights(lm.state_dict().items(), version=0)
        return engine.generate(builder.prompts(sessions), eval_sampling(at, responses)), builder


def _score(rollouts: Sequence[Rollout], builder: PromptBuilder, config: RunConfig, judges: Judges) -> Scores:
    scores = evaluate.score(rollouts, builder.parse, num_queries=config.data.num_queries)
    scores["judged"] = np.array([_judged(judges.labeller, r, r.text) for r in rollouts])
    if judges.encode is not None:
        scores["similarity"] = similarity(
            judges.encode, [(builder.parse(r.text), list(r.prompt.next_queries)) for r in rollouts]
        )
    return scores


def _copy_last(rollouts: Sequence[Rollout], config: RunConfig, judges: Judges) -> Scores:
    """The row of repeating the last query, on the same prompts."""
    count, prompts = config.data.num_queries, [r.prompt for r in rollouts]
    scores = evaluate.copy_last(prompts, num_queries=count)
    texts = [config.data.separator.join([p.history[-1]] * count) for p in prompts]
    scores["judged"] = np.array([_judged(judges.labeller, r, text) for r, text in zip(rollouts, texts, strict=True)])
    if judges.encode is not None:
        scores["similarity"] = similarity(judges.encode, [([p.history[-1]], list(p.next_queries)) for p in prompts])
    return {name: values[None] for name, values in scores.items()}


def _judged(labeller: Labeller, rollout: Rollout, text: str) -> float:
    return float(labeller(rollout.prompt.history, rollout.prompt.next_queries, text).sentence)


def similarity(encode: Encode, sides: Sequence[tuple[Sequence[str], Sequence[str]]]) -> np.ndarray:
    """For each (generated, true) queries: the mean over the generated ones of the cosine to the nearest true one, 0 without.

    High for a copy of the history too: never read it without the copy-last row.
    """
    vectors = encode(sorted({text for pair in sides for queries in pair for text in queries}))
    found = []
    for generated, truth in sides:
        kept = [text for text in generated if normalise_query(text)]
        if not kept:
            found.append(0.0)
            continue
        one, two = (np.stack([vectors[text] for text in texts]) for texts in (kept, truth))
        found.append(float((one @ two.T).max(1).mean()))
    return np.array(found)


def default_judge(config: RunConfig) -> LexicalLabeller:
    """The judge that needs no model."""
    return LexicalLabeller(separator=config.data.separator, num_queries=config.data.num_queries)


def write(folder: Path, panel: Panel, duels: Sequence[Duel], record: Mapping[str, object]) -> list[Path]:
    """In ``folder`` ``evaluation.json`` (table, duels, record), ``evaluation.csv`` (a row for each policy and metric),
    ``differences.csv`` (a row for each pair and metric; its p-values are not corrected) and ``responses.csv`` (each response with
    its metrics)."""
    rows = [
        (name, metric, e.mean, e.low, e.high, e.users) for name, row in panel.table.items() for metric, e in row.items()
    ]
    gaps = [
        (duel.a, duel.b, metric, e.mean, e.low, e.high, e.p) for duel in duels for metric, e in duel.differences.items()
    ]
    whole = {
        "record": dict(record),
        "metrics": {**evaluate.METRICS, **EXTRA},
        "table": {
            name: {
                metric: asdict(e) | {"runs": panel.scores[name][metric].mean(1).tolist()} for metric, e in row.items()
            }
            for name, row in panel.table.items()
        },
        "duels": [asdict(duel) for duel in duels],
    }
    files = {
        folder / "evaluation.json": json.dumps(_finite(whole), indent=1, allow_nan=False).encode(),
        folder / "evaluation.csv": _csv(("policy", "metric", "mean", "low", "high", "users"), rows),
        folder / "differences.csv": _csv(("a", "b", "metric", "mean", "low", "high", "p"), gaps),
        folder / "responses.csv": _responses(panel),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            write_atomic(path, content)
    except OSError as error:
        raise UserError(f"--out {str(folder)!r} cannot be written ({error.strerror}): choose another folder") from None
    return list(files)


def _responses(panel: Panel) -> bytes:
    """policy, run, session (its row in the data, from 1), user, text and every metric of each response."""
    metrics = list(next(iter(panel.scores[name] for name in panel.rollouts)))
    rows = []
    for name, runs in panel.rollouts.items():
        for run, rollouts in enumerate(runs):
            session, last = 0, None
            for i, rollout in enumerate(rollouts):
                session, last = session + (rollout.prompt is not last), rollout.prompt
                values = [f"{panel.scores[name][metric][run, i]:.6g}" for metric in metrics]
                rows.append([name, run, session, rollout.prompt.user_id, rollout.text, *values])
    return _csv(["policy", "run", "session", "user_id", "response", *metrics], rows)


def _csv(head: Sequence[str], rows: Sequence[Sequence[object]]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer).writerows([head, *rows])
    return buffer.getvalue().encode()


def _finite(value: object) -> object:
    """JSON has no NaN."""
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if value != value else value
