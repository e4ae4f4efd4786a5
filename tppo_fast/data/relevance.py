"""What share of a response is relevant: the measure of every table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tppo_fast.words import normalise_query


def relevance(queries: Sequence[str], *, relevant: Iterable[str], history: Iterable[str], num_queries: int) -> float:
    """Share of the ``num_queries`` slots filled with a relevant, new and unrepeated query, in [0, 1].

    A slot counts when its query is in ``relevant``, not in ``history`` and not in an earlier slot, all compared after
    ``normalise_query``. Slots left empty count as misses; queries past ``num_queries`` are ignored.
    """
    wanted = {normalise_query(query) for query in relevant} - {normalise_query(query) for query in history}
    return len({normalise_query(query) for query in queries[:num_queries]} & wanted) / num_queries
