"""What a finished reward model leaves: record and model card beside its weights, and a report with plots and example responses.

The report shows histories and next queries of users, so it never lies in the folder that is passed on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tppo_fast import figures, report
from tppo_fast.data.rows import searched
from tppo_fast.estimates import Estimate
from tppo_fast.hashing import sha256_of
from tppo_fast.metrics import GLOSSARY, read_metrics
from tppo_fast.reward_model.data import Example
from tppo_fast.reward_model.quality import METRICS, Scored, reliability
from tppo_fast.reward_model.settings import RewardModelConfig
from tppo_fast.rewards.token_model import RECORD, TokenModel

EXAMPLES = 12
MODEL = "reward model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished training, measured."""

    config: RewardModelConfig
    model: TokenModel
    test: Sequence[Example]
    """The test responses."""
    scored: Scored
    """Their labels and the model's probabilities."""
    table: Mapping[str, Mapping[str, Estimate]]
    """Reward model and baselines -> metric -> estimate."""
    facts: Mapping[str, Any]
    """Hashes, counts and steps for the record."""


def write(folder: Path, result: Result) -> None:
    """Record and card into ``folder``, in which the model lies already."""
    record = {
        "reader": {
            "template": result.model.reader.template,
            "separator": result.model.reader.separator,
            "max_tokens": result.model.reader.max_tokens,
        },
        "hindsight": result.model.hindsight,
        "verdict": verdict(result.table),
        **result.facts,
        "weights_sha256": sha256_of(folder / "model.safetensors"),
        "metrics": {name: {m: asdict(e) for m, e in row.items()} for name, row in result.table.items()},
        "config": result.config.model_dump(mode="json"),
        "machine": report.machine_record(),
    }
    (folder / RECORD).write_text(json.dumps(_no_nan(record), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(result, record), encoding="utf-8")


def verdict(table: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Whether the model's token AUC is above both baselines, in one sentence."""
    own = table[MODEL]["auc"]
    others = {name: row["auc"] for name, row in table.items() if name != MODEL}
    figure = f"Held-out token AUC {own:.3f}"
    named = ", ".join(f"{name} {e:.3f}" for name, e in others.items())
    if math.isnan(own.mean):
        return "No held-out token AUC: the words of all test users have one and the same label; label responses of both kinds."
    if math.isnan(own.low):
        return f"{figure}, from too few test users ({own.users}) to show anything ({named}): label more."
    missed = [name for name, e in others.items() if not own.low > e.high]
    if missed:
        return f"{figure}: NOT shown to be better than {' and '.join(missed)} ({named}); the 95 % intervals overlap."
    return f"{figure}: above {named}; the 95 % intervals do not overlap."


def _card(result: Result, record: Mapping[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tppo_fast"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )  # no autoescape: the card is Markdown
    classifier = result.model.classifier
    table = {name: {m: f"{row[m]:.3f}" for m in METRICS} for name, row in result.table.items()}
    return environment.get_template("model_card.md").render(
        record,
        architecture=type(classifier).__name__,
        backbone=result.config.backbone.path,
        parameters=f"{sum(p.numel() for p in classifier.parameters()):,}",
        template=record["reader"]["template"],
        separator=record["reader"]["separator"],
        users=result.table[MODEL]["auc"].users,
        table=table,
        metrics=METRICS,
        glossary=GLOSSARY,
        folder=str(result.config.run_dir / "model"),
    )


def write_report(path: Path, result: Result) -> None:
    """One page with loss curves, reliability diagram and responses of test users."""
    losses = {"reward_model/loss": "training", "reward_model/validation_loss": "validation"}
    rows = {name: {f"reward_model/{m}": e for m, e in row.items()} for name, row in result.table.items()}
    report.write_report(
        path,
        report.Report(
            title="Token reward model",
            verdict=verdict(result.table),
            command="tppo-fast reward-model CONFIG.toml, with the settings below",
            settings=result.config.model_dump(mode="json"),
            table=rows,
            examples=[_example(result, i) for i in range(min(EXAMPLES, len(result.test)))],
            number_shown="P(relevant) by the reward model, its colour the label",
            figures={
                "Loss by optimizer step": figures.curves(read_metrics(result.config.run_dir), losses, "Loss"),
                "Predicted against true relevance of held-out tokens": figures.reliability(reliability(result.scored)),
            },
        ),
    )


def _example(result: Result, index: int) -> report.Example:
    example = result.test[index]
    mine = result.scored.response == index
    relevant = result.scored.probabilities[mine, 2].tolist()
    text = example.row.response
    past, true = " | ".join(searched(example.row.history)), " | ".join(example.row.next_queries)
    tokens = [
        (text[a:b], int(c), p)
        for (a, b), c, p in zip(example.encoded.spans, example.labels.tolist(), relevant, strict=True)
    ]
    return report.Example(caption=f"History: {past}. True next: {true}", tokens=tokens)


def _no_nan(value: Any) -> Any:
    """NaN becomes null: JSON has none."""
    if isinstance(value, Mapping):
        return {key: _no_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
