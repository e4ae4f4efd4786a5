"""``tppo-fast label``: options in, one labelling run or one comparison out. Imports nothing heavy before it must."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tppo_fast.errors import LabellingFailed, UserError

if TYPE_CHECKING:
    from tppo_fast.data.sessions import Session
    from tppo_fast.labelling.judges import Judge
    from tppo_fast.labelling.records import Response
    from tppo_fast.labelling.run import Plan, Result

FILE = click.Path(path_type=Path)
COUNT = click.IntRange(1)
POSITIVE = click.FloatRange(0, min_open=True)


@click.command()
@click.argument("sessions", type=FILE, required=False)
@click.option(
    "--responses", type=FILE, help="Responses to label (.jsonl, .parquet), or a policy's folder to sample from."
)
@click.option("--labeller", type=click.Choice(["lexical", "embedding", "llm"]), help="Who judges.")
@click.option("--out", type=FILE, help="Labels file, .jsonl or .parquet; journal, record and rejects stand beside it.")
@click.option(
    "--agreement", type=FILE, nargs=2, help="Compare two labels files instead; --out FILE.json keeps the figures."
)
@click.option("--model", default="", help="embedding: folder of a sentence encoder. llm: the model's name.")
@click.option(
    "--config",
    type=FILE,
    help="A run's TOML file: how its [data] writes prompts for a policy, its separator and num_queries. [the policy's own]",
)
@click.option("--separator", help="Text between the queries of a response. [, ]")
@click.option("--num-queries", type=COUNT, help="lexical, embedding: words of later queries are irrelevant.")
@click.option(
    "--mode",
    type=click.Choice(["leave-one-out", "prefix"]),
    default="leave-one-out",
    show_default=True,
    help="embedding: what a word is compared with; prefix labels are causal.",
)
@click.option("--query-threshold", type=float, help="embedding: least similarity of a query with relevant words.")
@click.option("--word-threshold", type=float, help="embedding: least similarity that a word must add.")
@click.option("--sentence-threshold", type=float, default=0.5, show_default=True, help="embedding: relevant responses.")
@click.option("--base-url", help="llm: any OpenAI-compatible endpoint. [$OPENAI_BASE_URL, or OpenAI]")
@click.option("--key-variable", default="OPENAI_API_KEY", show_default=True, help="llm: where the key is.")
@click.option("--template", default="token", show_default=True, help="llm: token, sentence, or your own .toml file.")
@click.option(
    "--response-format",
    type=click.Choice(["json_schema", "json_object", "text"]),
    default="json_schema",
    show_default=True,
    help="llm: how the endpoint is held to the answer's form.",
)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="llm: of the judge.")
@click.option("--answer-tokens", type=click.IntRange(0), help="llm: longest answer, 0 for no limit. [64 + 12 per word]")
@click.option("--timeout", type=POSITIVE, default=60.0, show_default=True, help="llm: seconds for one request.")
@click.option("--retries", type=click.IntRange(0), default=5, show_default=True, help="llm: of a request that failed.")
@click.option("--attempts", type=COUNT, default=3, show_default=True, help="llm: at an answer that is malformed.")
@click.option("--concurrency", type=COUNT, default=8, show_default=True, help="llm: requests at once.")
@click.option("--requests-per-minute", type=POSITIVE, help="llm: limit of the whole run.")
@click.option("--tokenizer", type=FILE, help="llm: folder of a tokenizer for the estimate. [4 characters a token]")
@click.option("--price-prompt", type=click.FloatRange(0), help="llm: of a million prompt tokens, for the estimate.")
@click.option("--price-completion", type=click.FloatRange(0), help="llm: of a million completion tokens.")
@click.option("--samples", type=COUNT, default=1, show_default=True, help="Responses to each session from a policy.")
@click.option("--max-new-tokens", type=COUNT, default=48, show_default=True, help="Longest response from a policy.")
@click.option(
    "--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Of sampling and intervals."
)
@click.option("--engine", default="hf", show_default=True, help="Who samples: hf or vllm.")
@click.option("--dry-run", is_flag=True, help="Only estimate.")
@click.option("--retry-rejects", is_flag=True, help="Judge again what was set aside.")
@click.option("--fresh", is_flag=True, help="Forget an earlier run into the same --out.")
def label(sessions: Path | None, agreement: tuple[Path, Path] | None, **options: Any) -> None:
    """Label every word of the responses to SESSIONS, or compare two labellers.

    Stopped in any way, the same command goes on where it was; the labels are the same as in one go.
    """  # fmt: skip
    refuse_endless(options)
    if agreement:
        _compare(*agreement, out=options["out"], seed=options["seed"])
        return
    missing = [n for n in ("responses", "labeller", "out") if options[n] is None]
    if sessions is None or missing:
        raise click.UsageError(
            f"Missing {'SESSIONS' if sessions is None else '--' + missing[0]}; or use --agreement A B."
        )
    _label(sessions, options)


def refuse_endless(options: Mapping[str, Any]) -> None:
    """click lets nan and inf through, ranges or not."""
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name.replace('_', '-')} {value}: give a finite number")


def _label(sessions_file: Path, options: dict[str, Any]) -> None:
    """Everything that can be wrong is said before anything is sampled or asked."""
    from tppo_fast.data.files import check_output
    from tppo_fast.data.sessions import read_sessions
    from tppo_fast.labelling import run as runs

    out: Path = options["out"]
    check_output(out, sessions_file, options["responses"])
    from tppo_fast.cli import quiet_libraries

    options = _as_supervised(options)
    sessions = read_sessions(sessions_file)
    if options["labeller"] == "embedding" or options["responses"].is_dir():
        quiet_libraries()
    with contextlib.closing(_judge(options)) as judge:
        runs.check_out(out, judge.identity, fresh=options["fresh"])
        llm, asks = options["labeller"] == "llm", not options["dry_run"]
        if llm and asks and options["fresh"]:
            judge.check()  # type: ignore[attr-defined]  # before anything is forgotten
        responses, responses_file = _responses(sessions, sessions_file, options)
        files = {"sessions": sessions_file, "responses": responses_file}
        sources = runs.Sources(sessions=sessions, responses=responses, files=files)
        work = runs.plan(sources, judge.identity)
        if responses_file.exists() and not options["fresh"]:
            runs.check_sources(out, sources, work)
        pending = _estimate(work, judge, options)
        if not asks:
            return
        if llm and pending and not options["fresh"]:
            judge.check()  # type: ignore[attr-defined]
        concurrency = options["concurrency"] if llm else 0
        how = {name: options[name] for name in ("retry_rejects", "fresh")}
        _say(runs.run(sources, judge, out, work, concurrency=concurrency, **how), judge, out)


def _as_supervised(options: dict[str, Any]) -> dict[str, Any]:
    """The options, and what ``--config``, or else the policy's folder, says where they do not."""
    from tppo_fast.config import DataConfig
    from tppo_fast.data import prompt_file
    from tppo_fast.finetune_config import read_run

    config: Path | None = options["config"]
    given = prompt_file.read(options["responses"]) if config is None else read_run(config)["data"]
    data = DataConfig(**given)
    asked = {
        "separator": data.separator,
        "num_queries": data.num_queries if given else None,
        "prompt_template": data.template,
        "max_prompt_tokens": data.max_prompt_tokens,
    }
    return options | {name: value for name, value in asked.items() if options.get(name) is None}


def _say(result: Result, judge: Judge, out: Path) -> None:
    used = getattr(judge, "usage", None)
    if used:
        counts = f"{used.prompt_tokens} prompt and {used.completion_tokens} completion tokens"
        click.echo(f"used: {used.requests} answers, {counts}")
    if result.rejected:
        click.echo(f"set aside: {result.rejected} responses, with the reason: {result.rejects}")
    if result.labelled:
        click.echo(f"labels: {result.labelled} responses in {out}")
    if result.failed:
        raise LabellingFailed(
            f"{result.failed[-1]}; {len(result.failed)} of the responses set aside could not be judged this time: the same "
            "command, without --fresh and --retry-rejects, tries them again"
        )
    if not result.labelled:
        raise LabellingFailed(f"no response could be labelled: every answer was set aside, see {result.rejects}")


def _judge(options: dict[str, Any]) -> Judge:
    """The chosen labeller."""
    kind, model = options["labeller"], options["model"]
    if kind != "lexical" and not model:
        what = "the folder of a sentence encoder" if kind == "embedding" else "the model's name at the endpoint"
        raise UserError(f"--labeller {kind} needs --model: give {what}")
    shared = {name: options[name] for name in ("separator", "num_queries")}
    if kind == "lexical":
        from tppo_fast.labelling.judges import OneByOne
        from tppo_fast.rewards.lexical import LexicalLabeller

        identity = {"labeller": "lexical", "rules": 1, "language": "english", **shared, "causal": True}
        return OneByOne(labeller=LexicalLabeller(**shared), identity=identity)
    if kind == "embedding":
        from tppo_fast.labelling.embedding import EmbeddingJudge, EmbeddingSettings, SentenceEncoder

        own = ("mode", "query_threshold", "word_threshold", "sentence_threshold")
        return EmbeddingJudge(SentenceEncoder(model), EmbeddingSettings(**shared, **{n: options[n] for n in own}))
    from tppo_fast.labelling.llm import LLMJudge, LLMSettings
    from tppo_fast.labelling.prompting import load_template

    settings = LLMSettings(**{name: options[name] for name in LLMSettings.__slots__})
    return LLMJudge(settings, load_template(options["template"]))


def _responses(
    sessions: Sequence[Session], sessions_file: Path, options: dict[str, Any]
) -> tuple[Sequence[Response], Path]:
    """The responses and their file; a policy is sampled first, except in a dry run."""
    from tppo_fast.labelling.records import Response, read_responses
    from tppo_fast.labelling.run import check_sampled_for

    given: Path = options["responses"]
    if not given.is_dir():
        check_sampled_for(given, sessions_file)
        return read_responses(given, sessions), given
    from tppo_fast.labelling.sampling import SampleSettings, policy_sha256, sampled_responses

    out: Path = options["out"].with_name(f"{options['out'].stem}.responses.jsonl")
    if options["out"].exists() and not out.exists() and not options["fresh"]:
        raise UserError(
            f"--out {str(options['out'])!r} holds labels and {str(out)!r}, what would be sampled for them, is not there: choose "
            "another name, or use --fresh"
        )
    names = ("samples", "max_new_tokens", "seed", "engine", "separator", "max_prompt_tokens")
    own = {name: options[name] for name in names}
    if options["dry_run"] and (options["fresh"] or not out.exists()):
        policy_sha256(given)
        click.echo("nothing is sampled in a dry run: the estimate takes the true next queries for responses")
        texts = [(n, s, options["separator"].join(s.next_queries)) for n, s in enumerate(sessions, 1)]
        samples = range(options["samples"])
        return [
            Response(session=n, user_id=s.user_id, text=f"{text}{' ' * i}") for n, s, text in texts for i in samples
        ], out
    settings = SampleSettings(policy=given, template=options["prompt_template"], **own)
    return sampled_responses(settings, sessions, sessions_file, out, fresh=options["fresh"]), out


def _estimate(work: Plan, judge: Judge, options: dict[str, Any]) -> int:
    """How many responses are still to be judged; what that will take is printed before it begins."""
    from tppo_fast.labelling.cost import by_characters, estimate
    from tppo_fast.labelling.journal import journal_path, read_journal
    from tppo_fast.labelling.run import without_rejects

    done = {} if options["fresh"] else read_journal(journal_path(options["out"]))
    if options["retry_rejects"]:
        done = without_rejects(done)
    pending = work.pending(done)
    click.echo(
        f"{len(work.keys)} responses, {len(work.items)} distinct, {len(work.items) - len(pending)} labelled already"
    )
    if options["labeller"] != "llm":
        return len(pending)
    count, rule = by_characters, "4 characters a token"
    if options["tokenizer"]:
        from tppo_fast.loading import load_tokenizer

        tokenizer = load_tokenizer(str(options["tokenizer"]))
        count, rule = (lambda text: len(tokenizer.encode(text, add_special_tokens=False))), str(options["tokenizer"])
    template: Any = judge.template  # type: ignore[attr-defined]
    found = estimate(pending, template, options["separator"], count)
    line = f"estimate ({rule}): {found.requests} requests, {found.prompt_tokens} prompt tokens, {found.completion_tokens} back"
    if options["price_prompt"] is not None or options["price_completion"] is not None:
        line += f", {found.price(options['price_prompt'] or 0.0, options['price_completion'] or 0.0):.4f} by the given prices"
    click.echo(f"{line}; retries and answers asked again come on top")
    return len(pending)


def _compare(a: Path, b: Path, *, out: Path | None, seed: int) -> None:
    from tppo_fast.atomic import write_atomic
    from tppo_fast.labelling.agreement import compare
    from tppo_fast.labelling.records import read_labels
    from tppo_fast.progress import table_console

    if out is not None and (out.suffix != ".json" or not out.parent.is_dir()):
        raise UserError(f"--out {str(out)!r}: give a name ending in .json, in a folder that exists")
    comparison = compare(read_labels(a), read_labels(b), seed=seed)
    table_console().print(comparison.table())
    if out is not None:
        write_atomic(out, (json.dumps({"a": a.name, "b": b.name, **comparison.as_json()}, indent=2) + "\n").encode())
        click.echo(f"figures: {out}")
