"""``tppo-fast convert``: a query log of others into sessions."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import click

from tppo_fast.errors import UserError

FILE = click.Path(path_type=Path)
CENTURY = 36_525 * 24 * 60
"""In minutes; longer than any log."""


@click.command()
@click.argument("log", type=FILE)
@click.option("--format", "kind", type=click.Choice(["aol", "trec", "sim4ia", "jsonl"]), required=True)
@click.option("--out", type=FILE, required=True, help="Sessions file, .jsonl or .parquet.")
@click.option(
    "--gap", type=click.IntRange(1, CENTURY), help="Minutes of pause that end a session. [30; trec, sim4ia: never]"
)
@click.option("--targets", type=click.IntRange(1), help="Newest queries to predict. [3; trec, sim4ia: 1]")
@click.option("--min-history", type=click.IntRange(1), default=1, show_default=True, help="Fewest queries before them.")
@click.option("--keep-addresses", is_flag=True, help="Keep queries that are a web address.")
@click.option(
    "--min-users", type=click.IntRange(1), default=5, show_default=True,
    help="Scrub, and drop queries with a word that fewer users typed, and clicks on sites that fewer users clicked.",
)  # fmt: skip
@click.option("--no-scrub", is_flag=True, help="Keep every text; user ids become pseudonyms all the same.")
@click.option("--fresh", is_flag=True, help="Replace an earlier --out.")
def convert(
    log: Path,
    kind: str,
    out: Path,
    gap: int | None,
    targets: int | None,
    min_history: int,
    keep_addresses: bool,
    min_users: int,
    no_scrub: bool,
    fresh: bool,
) -> None:
    """Turn a query LOG into sessions: split at pauses, the newest queries as targets, personal queries dropped.

    A query log is personal data. Use a copy that you may lawfully use, and keep the result as private as the log:
    scrubbing lowers the risk that it names people and does not end it.

    The format jsonl is any log, a line for each query: {"user_id": "u17", "query": "lisbon", "time": "2006-03-01 07:17:12"},
    and optionally "click". Times with a zone become UTC; a log's times have all a zone or none.
    """
    from tppo_fast.data.files import check_output
    from tppo_fast.data.readers import Rules
    from tppo_fast.data.readers import convert as run
    from tppo_fast.data.sessions import write_sessions

    check_output(out, log)
    if out.exists() and not fresh:
        raise UserError(f"--out {str(out)!r} is there already: choose another name, or use --fresh to replace it")
    whole = kind in ("trec", "sim4ia")  # sessions are given
    rules = Rules(
        gap=timedelta(minutes=gap) if gap else timedelta(minutes=CENTURY) if whole else timedelta(minutes=30),
        targets=targets or (1 if whole else 3),
        min_history=min_history,
        navigational=keep_addresses,
    )
    sessions, dropped = run(log, kind, rules, min_users=None if no_scrub else min_users, key=os.urandom(32))
    write_sessions(out, sessions)
    users = len({session.user_id for session in sessions})
    click.echo(f"{len(sessions)} sessions of {users} users: {out}")
    for why, count in sorted(dropped.items(), key=lambda item: -item[1]):
        click.echo(f"dropped {count} {why}")
