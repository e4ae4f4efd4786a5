"""``tppo-fast generate``: the next queries of a trained policy, for one history or a file of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tppo_fast.cli_label import refuse_endless

FILE = click.Path(path_type=Path)
COUNT = click.IntRange(1)


@click.command()
@click.argument("policy", type=FILE)
@click.option("--search", multiple=True, help="A query of the history; give it once for each, oldest first.")
@click.option("--click", "clicks", multiple=True, help="A click of the history, likewise.")
@click.option(
    "--data", type=FILE, help="Histories: a .jsonl or .parquet file of sessions; next_queries are not needed."
)
@click.option("--out", type=FILE, help="With --data: the file of responses, .jsonl or .parquet, as label takes them.")
@click.option(
    "--config", type=FILE, help="A run's TOML file, for its [data] settings. [the prompt.json in the policy's folder]"
)
@click.option("--samples", type=COUNT, default=1, show_default=True, help="Responses to each history.")
@click.option("--max-new-tokens", type=COUNT, default=48, show_default=True, help="Longest response.")
@click.option("--temperature", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True)
@click.option("--greedy", is_flag=True, help="Take the most likely token each time.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Of the sampling.")
@click.option("--engine", default="hf", show_default=True, help="Who samples: hf or vllm.")
@click.option("--fresh", is_flag=True, help="Forget an earlier run into the same --out.")
def generate(
    policy: Path,
    search: tuple[str, ...],
    clicks: tuple[str, ...],
    data: Path | None,
    out: Path | None,
    config: Path | None,
    fresh: bool,
    **options: Any,
) -> None:
    """Let POLICY, the folder that a run leaves, say what is asked next.

    With --search a line for each response; with --data and --out a file, which the same command continues when it was stopped.
    """
    refuse_endless(options)
    history = {kind: entries for kind, entries in (("search", search), ("click", clicks)) if entries}
    if bool(history) == (data is not None) or (data is None) != (out is None):
        raise click.UsageError("Give --search (and --click), or --data and --out.")
    from tppo_fast import model_folder
    from tppo_fast.config import DataConfig
    from tppo_fast.data import prompt_file
    from tppo_fast.data.files import check_output
    from tppo_fast.data.sessions import read_histories
    from tppo_fast.finetune_config import read_run

    model_folder.check(str(policy), "POLICY")
    if out is not None and data is not None:
        check_output(out, data)
    known = prompt_file.read(policy) if config is None else read_run(config)["data"]
    if not known:
        click.echo(f"{policy} has no {prompt_file.FILE}: prompts are written by the default template", err=True)
    sessions = read_histories(data) if data else []
    from tppo_fast.cli import quiet_libraries

    quiet_libraries()
    from tppo_fast.generation import generate as sample
    from tppo_fast.generation import settings_of
    from tppo_fast.labelling.sampling import sampled_responses

    if out is not None and data is not None:
        found = sampled_responses(settings_of(policy, known, **options), sessions, data, out, fresh=fresh)
        click.echo(f"responses: {len(found)} in {out}")
        return
    for queries in sample(policy, [history], prompts=known, **options)[0]:
        click.echo(DataConfig(**known).separator.join(queries))
