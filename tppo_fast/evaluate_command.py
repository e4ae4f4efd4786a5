"""``tppo-fast evaluate``: policies named in the shell, a table on stdout, JSON and CSV in a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from tppo_fast import panel
from tppo_fast.config import DataConfig, RunConfig
from tppo_fast.data import prompt_file
from tppo_fast.data.sessions import read_sessions
from tppo_fast.errors import LabellingFailed, UserError
from tppo_fast.estimates import cell, few_users, holm
from tppo_fast.labelling.embedding import EmbeddingJudge, EmbeddingSettings, SentenceEncoder
from tppo_fast.plugins import guarded, load_object
from tppo_fast.progress import say, table_console
from tppo_fast.report import verdict
from tppo_fast.rewards import Labeller, Labels

COLUMNS = ("relevance", "judged", "hit", "mrr", "similarity", "distinct", "valid", "length", "copy")
"""What is printed; the files hold every metric."""
WITH_INTERVAL = ("relevance", "judged")


def run(
    config: RunConfig,
    words: Sequence[str],
    *,
    data: Path,
    out: Path,
    responses: int,
    judge: str,
    pair_judge: str | None,
    embedding: Path | None,
    fresh: bool = False,
    own_prompts: bool = False,
) -> panel.Panel:
    """Evaluate, print and write.

    Args:
        config: the ``data`` and ``rollout`` settings.
        words: policy folders, or NAME=FOLDER; one NAME may stand several times, once for each seed.
        data: held-out sessions.
        out: folder of what ``panel.write`` writes.
        responses: sampled responses to each session.
        judge: "lexical", "embedding", or module:object of a labeller.
        pair_judge: module:function that compares two responses, or None for the labeller's judgements.
        embedding: folder of a sentence encoder, for the similarity and for judge "embedding".
        fresh: replace the evaluation of other policies, data or settings in ``out``.
        own_prompts: write prompts as the first policy's folder says, not as ``config.data``.

    Raises:
        UserError: a folder, file or judge that cannot be used, or ``out`` holds another evaluation; or, after the table was
            shown, files that cannot be written.
        LabellingFailed: the judge of pairs failed; table and files are written without its part.
    """
    place = next(p for p in (out, *out.parents) if p.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise UserError(f"--out {str(out)!r}: {str(place)!r} is no folder to write into; choose another")
    policies = parse_policies(words)
    if own_prompts:
        first = next(iter(policies.values()))[0]
        config = config.model_copy(update={"data": DataConfig(**prompt_file.read(first))})
    sessions = read_sessions(data)
    if config.threads:
        torch.set_num_threads(config.threads)
    record = {
        "policies": {name: [str(f) for f in folders] for name, folders in policies.items()}, "data": str(data),
        "sessions": len(sessions), "responses": responses, "judge": judge,
        "embedding": embedding and str(embedding), "pair_judge": pair_judge,
        "settings": config.model_dump(mode="json"),
    }  # fmt: skip
    if not fresh:
        _check_out(out, record)
    judges = build_judges(config, judge, pair_judge, embedding)
    found = panel.evaluate_policies(config, policies, sessions, judges, responses=responses)
    try:
        duels, failed = found.duels(judges, config.seed), ""
    except (UserError, LabellingFailed) as error:  # what was sampled and scored is worth having all the same
        duels, failed = [], str(error)
    show(found, duels)
    for sentence in _verdicts(duels):
        table_console().print(Text(sentence))
    for path in panel.write(out, found, duels, record):
        say(Text(f"wrote {path}"))
    if failed:
        raise LabellingFailed(f"{failed}; the table is complete, but no policy was judged against another")
    return found


def _check_out(out: Path, record: Mapping[str, object]) -> None:
    """Refuse to replace an evaluation of something else; one that cannot be read is none."""
    try:
        was = json.loads((out / "evaluation.json").read_bytes())["record"]
        changed = next((name for name, value in record.items() if was.get(name) != value), None)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return
    if changed:
        raise UserError(
            f"--out {str(out)!r} holds an evaluation with other {changed}: choose another folder, or use --fresh to replace it"
        )


def build_judges(config: RunConfig, judge: str, pair_judge: str | None, embedding: Path | None) -> panel.Judges:
    """The judges named in the shell.

    Raises:
        UserError: one cannot be loaded, or "embedding" has no encoder.
    """
    encoder = None if embedding is None else SentenceEncoder(embedding, setting="--embedding")
    if judge == "lexical":
        labeller = panel.default_judge(config)
    elif judge != "embedding":
        labeller = _labeller(judge)
    elif encoder is None:
        raise UserError("--judge embedding needs --embedding: give the folder of a sentence encoder")
    else:
        settings = EmbeddingSettings(separator=config.data.separator, num_queries=config.data.num_queries)
        labeller = EmbeddingJudge(encoder, settings)
    pair = None
    if pair_judge is not None:
        pair = guarded(load_object(pair_judge, "--pair-judge"), f"--pair-judge = {pair_judge!r}")
    return panel.Judges(labeller=labeller, pair=pair, encode=encoder)


def _labeller(judge: str) -> Labeller:
    """The labeller of a user, which may not keep its side."""
    field = f"--judge = {judge!r}"
    given: Callable[..., object] = guarded(load_object(judge, "--judge"), field)

    def call(history: Sequence[str], next_queries: Sequence[str], response_text: str, /) -> Labels:
        labels = given(history, next_queries, response_text)
        if not isinstance(labels, Labels):
            raise UserError(f"{field} returned a {type(labels).__name__}: return tppo_fast.rewards.Labels")
        return labels

    return call


def parse_policies(words: Sequence[str]) -> dict[str, list[Path]]:
    """NAME=FOLDER or FOLDER (named by itself) -> name -> folders.

    Raises:
        UserError: no such folder, or a name that cannot be used.
    """
    policies: dict[str, list[Path]] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or Path(word).is_dir():  # runs/lr=0.1 is a folder, too
            name, folder = word.rstrip("/"), word
        if not name.strip() or name == panel.COPY_LAST:
            why = "is the row that is always there" if name.strip() else "is no name"
            raise UserError(f"policy {word!r}: {name!r} {why}; give another NAME=FOLDER")
        if not Path(folder).is_dir():
            raise UserError(f"policy {word!r}: there is no folder {folder!r}; give FOLDER or NAME=FOLDER")
        policies.setdefault(name, []).append(Path(folder))
    return policies


def show(found: panel.Panel, duels: Sequence[panel.Duel]) -> None:
    """The table and the duels; names are text, whatever rich would read into them."""
    shown = Table(title="Held-out sessions: mean [95 % interval over users, and seeds where there are several]")
    present = [column for column in COLUMNS if any(column in row for row in found.table.values())]
    for column in ("policy", *present):
        shown.add_column(column, overflow="fold")
    for name, row in found.table.items():
        shown.add_row(Text(name), *(cell(row.get(metric), metric in WITH_INTERVAL) for metric in present))
    console = table_console()
    console.print(shown)
    if few := few_users(found.table):
        console.print(few)
    for duel in duels:
        said = (
            f"Judged in both orders, {duel.a} against {duel.b}: wins {duel.win:.1%}, ties {duel.tie:.1%}, loses {duel.lose:.1%}; "
            f"wins minus losses {duel.margin:+.3f}"
        )
        console.print(Text(said))
    for (a, left), (b, right) in combinations(found.rollouts.items(), 2):
        if len(left) != len(right):
            said = f"{a} and {b} are not compared: {len(left)} and {len(right)} runs; give both the same number of folders."
            console.print(Text(said))


def _verdicts(duels: Sequence[panel.Duel]) -> list[str]:
    """Each pair in relevance and in the share judged relevant, p-values corrected for the number of pairs."""
    names = [(duel.a, duel.b) for duel in duels]
    said = []
    for metric in WITH_INTERVAL:
        gaps = holm([duel.differences[metric] for duel in duels])
        said += [
            verdict(a, b, gap.mean, gap.low, gap.high, f"eval/{metric}", p=gap.p)
            for (a, b), gap in zip(names, gaps, strict=True)
        ]
    return said
