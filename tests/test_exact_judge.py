"""The judges that know the generated world: calibrated, ordered by what they know, and causal where they say so."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from tppo_fast.data import baselines
from tppo_fast.data.lexicon import FACETS
from tppo_fast.data.perturb import perturb
from tppo_fast.data.sessions import Session
from tppo_fast.data.synthetic import forms, generate_sessions
from tppo_fast.labelling.records import LabelledResponse
from tppo_fast.reward_model import exact_judge, quality
from tppo_fast.reward_model.data import Example
from tppo_fast.rewards.lexical import LexicalLabeller
from tppo_fast.rewards.token_model import Encoded

LABELLER = LexicalLabeller(num_queries=3)


def example(session: Session, queries: list[str], relevant: tuple[str, ...] | None = None) -> Example:
    """A planted response whose tokens are its words and separators."""
    response = " " + ", ".join(queries)
    labels = LABELLER(session.history["search"], relevant or session.relevant_queries, response)
    row = LabelledResponse(
        user_id=session.user_id,
        history=session.history,
        next_queries=session.next_queries,
        response=response,
        labels=labels,
        labeller="planted",
    )
    count = range(len(labels.spans))
    encoded = Encoded(input_ids=count, token_type_ids=None, response=count, spans=labels.spans)
    classes = torch.tensor(labels.classes)
    return Example(row=row, encoded=encoded, labels=classes, copied=classes)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    rng, made = random.Random(0), []
    sessions = generate_sessions(150, 0)
    pool = [query for session in sessions for query in session.next_queries]
    for session in sessions:
        domain, topic, _, _ = baselines.current(session)
        queries = [rng.choice(forms(topic, rng.choice(FACETS[domain]))) for _ in range(3)]
        made += [example(session, queries), example(session, perturb(queries, session.history["search"], pool, rng))]
    return made


def auc(examples: list[Example], judge: exact_judge.Judge) -> float:
    lengths = [len(e.labels) for e in examples]
    scored = quality.Scored(
        probabilities=exact_judge.as_probabilities([judge(e) for e in examples]),
        labels=torch.cat([e.labels for e in examples]).numpy(),
        sentence=np.array([e.row.labels.sentence for e in examples]),
        response=np.repeat(np.arange(len(examples)), lengths),
        user=np.arange(len(examples)),
    )
    return quality.measure(scored, resamples=1)["auc"].mean


def test_who_knows_more_ranks_better(examples: list[Example]) -> None:
    table = exact_judge.judges(LABELLER, [e.row for e in examples])
    found = {name: auc(examples, judge) for name, judge in table.items()}
    exact, session_only, topic, causal = found.values()
    assert 1.0 > exact > session_only > topic > 0.9
    assert exact > causal > 0.8


def test_the_exact_judge_is_calibrated(examples: list[Example]) -> None:
    said = np.concatenate([exact_judge.exact(e, LABELLER, baselines.posterior) for e in examples])
    true = torch.cat([e.labels == 2 for e in examples]).numpy()
    for low, high in ((0.0, 0.1), (0.1, 0.5), (0.5, 0.9), (0.9, 1.01)):
        part = (said >= low) & (said < high)
        spread = np.sqrt((said[part] * (1.0 - said[part])).sum()) / part.sum()
        assert abs(said[part].mean() - true[part].mean()) < 6.0 * spread + 0.01  # words of a query err together


def test_without_doubt_the_exact_judge_gives_the_labels() -> None:
    session = generate_sessions(1, 0)[0]
    domain, topic, _, asked = baselines.current(session)
    sure = (1, next(iter(FACETS[domain])))
    relevant = exact_judge.relevant_facets(sure[0], domain, sure[1], asked)
    queries = [form for facet in FACETS[domain][:4] for form in forms(topic, facet)][:3]
    one = example(session, queries, tuple(form for facet in relevant for form in forms(topic, facet)))
    found = exact_judge.exact(one, LABELLER, lambda _: {sure: 0.3})
    assert found.tolist() == [float(c == 2) for c in one.labels.tolist()]


def test_the_causal_judge_does_not_look_ahead() -> None:
    session = generate_sessions(1, 0)[0]
    domain, topic, _, _ = baselines.current(session)
    rates = np.array([0.9, 0.8, 0.7, 0.4])
    seen = session.history["search"][-1]
    new = [form for facet in FACETS[domain] for form in forms(topic, facet) if form not in session.history["search"]]
    first, *rest = new
    copy, fresh = (
        example(session, [first, f"{topic} {last}"]) for last in (seen.removeprefix(f"{topic} "), "xylophone")
    )
    before, after = (exact_judge.causal(e, LABELLER, rates) for e in (copy, fresh))
    ahead = len(first.split()) + 1 + len(topic.split())  # up to the last word of the second query
    assert before[:ahead].tolist() == after[:ahead].tolist()
    longer = exact_judge.causal(example(session, [first, *rest[:2]]), LABELLER, rates)
    assert longer[: len(first.split())].tolist() == before[: len(first.split())].tolist()
    assert not np.array_equal(before[:ahead], exact_judge.exact(copy, LABELLER, baselines.posterior)[:ahead])


def test_a_query_is_new_the_first_time(examples: list[Example]) -> None:
    row = replace(examples[0].row, response=" a b, a b, c, d, d, e", history={"search": ("c",)})
    assert exact_judge._new_at_place([row], ", ").tolist() == [1.0, 0.0, 0.0, pytest.approx(2 / 3)]
