"""When two queries are the same, and what share of a response is relevant: the measure of every table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def normalise(query: str) -> str:
    """Lower case, single spaces: the form in which queries are compared."""
    return " ".join(query.lower().split())


def relevance(queries: Sequence[str], *, relevant: Iterable[str], history: Iterable[str], num_queries: int) -> float:
    """Share of the ``num_queries`` slots filled with a relevant, new and unrepeated query, in [0, 1].

    A slot counts when its query is in ``relevant``, not in ``history`` and not in an earlier slot, all compared after
    ``normalise``. Slots left empty count as misses; queries past ``num_queries`` are ignored.
    """
    wanted = {normalise(query) for query in relevant} - {normalise(query) for query in history}
    return len({normalise(query) for query in queries[:num_queries]} & wanted) / num_queries
