"""``reward.per = "word"``: what a text earns does not depend on the tokens it was sampled in."""

from __future__ import annotations

from typing import Any

import pytest
from support import letter_by_letter
from test_rewards import PLAIN, ROLLOUT, TOKENIZER, response, rewards

from tppo_fast.errors import UserError
from tppo_fast.rewards import Labels


@pytest.mark.parametrize(
    ("settings_", "expected"),
    [({}, 0.0), ({"scale": "paper"}, 6.0), ({"reject_copies": True}, -2.0), ({"placement": "last"}, 0.0)],
)
def test_paid_by_the_word_a_text_earns_the_same_however_it_is_spelled(
    settings_: dict[str, Any], expected: float
) -> None:
    given = response(" lisbon hotels, pasta, porto", truth=("lisbon hotels", "porto"))  # the last query is a copy
    both = [given, letter_by_letter(given, TOKENIZER)]
    by_token, by_word = (rewards(**{**PLAIN, "per": per, **settings_})(both) for per in ("token", "word"))
    assert [r.sum().item() for r in by_word] == pytest.approx([expected] * 2, abs=1e-5)
    assert by_token[1].sum().item() > by_token[0].sum().item() + 1.0  # the paper's rule pays for the spelling
    penalised = rewards(per="word", expected_length=6.0, **settings_)(both)
    assert penalised[1].sum().item() <= penalised[0].sum().item() or "scale" not in settings_


def test_a_word_paid_once_is_divided_over_its_tokens_and_numbers_are_not_words() -> None:
    letters = letter_by_letter(response(" pasta, lisbon"), TOKENIZER)
    values, classes = (r[0] for r in rewards(per="word", **PLAIN).explain([letters]))
    assert values.tolist() == pytest.approx([0.0, *[-1 / 5] * 5, 0.0, 0.0, *[1 / 6] * 6, 0.0])
    assert classes == [0, *[1] * 5, 0, 0, *[2] * 6, 0]
    across = lambda _: [Labels(spans=[(1, 4), (4, 7)], classes=[2, 1], sentence=1)]  # noqa: E731
    assert rewards(across, per="word", **PLAIN)([ROLLOUT])[0].tolist() == pytest.approx(
        [0.0] * 5
    )  # a token of both words
    assert rewards(across, **PLAIN)([ROLLOUT])[0].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
    with pytest.raises(UserError, match=r'reward\.per = "word" needs labels .* gives numbers: set it to "token"'):
        rewards(lambda _: [1.0], per="word")([ROLLOUT])
    assert rewards(per="word", **PLAIN)([response(" , ,")])[0].eq(0.0).all()
