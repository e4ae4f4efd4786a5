"""The ``reward`` section: who scores, what a judgement pays, where it lands."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tppo_fast.sections import NonNegative, PathText, Pluggable, Positive, Section, Unit


class RewardConfig(Section):
    source: Pluggable = "lexical"
    """Who scores: "lexical" (word labels against the true next queries), "model" or module:function."""
    model: PathText = ""
    """With source "model": the folder of a token reward model, from tppo-fast reward-model. It is frozen."""
    trust_remote_code: bool = False
    """Run Python code that ships inside the reward model's folder. Off unless you have read that code."""
    value: Literal["argmax", "soft", "tlcr", "red"] = "argmax"
    """What the reward model's class probabilities pay. "argmax": the likeliest class, by ``scale`` (TPPO). "soft": the
    expectation over classes. "tlcr": 2 P(relevant) - 1, without ``scale``. "red": what each token adds to the score of the
    response so far (needs a causal model)."""
    red_share: Unit = 1.0
    """With "red": this share is spread over the tokens, the rest stands on the last one."""
    reject_copies: bool = False
    """Treat the words of a query that repeats the history, or an earlier query of the response, as irrelevant, whatever the
    source says, and charge the token that ends such a query the difference between a relevant and an irrelevant token. A
    judgement of the whole response is irrelevant where most of it are copies. Labels and class probabilities only."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the reward model scores; auto is the trainer's device."""
    batch_tokens: Annotated[int, Field(ge=16)] = 16384
    """Most tokens in one forward pass of the reward model."""
    placement: Literal["token", "last", "sentence"] = "token"
    """"token": each token gets its own reward. "last": the same rewards summed onto the last token. "sentence": one judgement
    of the whole response there. Every ``algorithm`` but "tppo" sets it."""
    per: Literal["token", "word"] = "token"
    """What a judgement is paid for. "token": each token of a word earns its word's full reward (TPPO), so that the same text pays
    more when it is sampled in more, smaller tokens. "word": a word earns once, divided over its tokens by their share of its
    visible characters (a token across two words gets a share of both), and the same text earns the same however it is spelled.
    Separators, spaces and the end token earn nothing; the reward model's word is the mean over its characters ("red": words
    take the place of tokens); ``placement`` "last" sums the shares, "sentence" judges by words; what ``reject_copies`` charges
    stays one difference a query. The length penalty still counts sampled tokens. Labels and class probabilities only."""
    scale: Literal["paper", "binary", "centred"] = "paper"
    """Reward of an irrelevant / relevant token; separators always get 0. "paper": 1 / 2, so that any token pays.
    "binary": 0 / 1, so that only relevant ones do. "centred": -1 / +1, so that ending early beats a poor query."""
    coefficient: float = 1.0
    """Multiplies every reward."""
    length_penalty: bool | None = None
    """Multiply the l-th token's reward by lwp(l) = 1 / (1 + exp(alpha (l - sl) - 6)), so that length past sl stops paying (TPPO,
    section 3.3). None: those from labels and class probabilities, while a reward's own numbers are taken as they are. One
    number per response is never multiplied."""
    length_alpha: Positive = 2.0
    """alpha of the length penalty, per token."""
    held_out: bool = False
    """Reward the responses to held-out sessions, too, and log ``eval/reward_mean``: one more call of the source in each
    evaluation, with one response to each session."""
    expected_length: NonNegative | None = None
    """sl in tokens. None: median query length of the training sessions times ``data.num_queries``, separators included."""

    @model_validator(mode="after")
    def _heard(self) -> RewardConfig:
        if self.model and self.source != "model":
            raise ValueError(
                f'reward.model = {self.model!r} has no effect with reward.source = "{self.source}": set source = "model", or '
                "leave model out"
            )
        if self.value != "argmax" and self.source == "lexical":
            raise ValueError(
                f'reward.value = "{self.value}" has no effect with reward.source = "lexical", which gives labels: set source = '
                '"model" (or your own, of class probabilities), or leave value out'
            )
        return self
