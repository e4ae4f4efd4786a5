"""The token reward model: history and response as texts in, class probabilities of every response token out.

Input is the rendered history, then the response, as the tokenizer's own pair encoding (special tokens and token types
are the backbone's). Only response tokens are labelled and scored. A decoder backbone is causal: a token's score depends
on nothing after it. An encoder reads the whole response, so its scores are hindsight; ``sees_later_tokens`` measures it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tppo_fast import attention
from tppo_fast.errors import UserError
from tppo_fast.packing import SegmentLists
from tppo_fast.rewards.labels import Span

if TYPE_CHECKING:
    from jaxtyping import Float

RECORD = "record.json"
"""Beside the weights: how to render the input, and what the model was trained on."""
TRAINING_USERS = "training_users.txt"
"""Beside the model's folder, not in it: ``hashing.user_hash`` of each user it was trained on, one a line."""
LEAST_FILLED = 0.75
"""Least share of tokens in a padded row. Batches of 32 of the demo's responses then cost 1.14 times their tokens, else 1.41."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One history and response in the reward model's tokens."""

    input_ids: Sequence[int]
    """The whole input, special tokens included."""
    token_type_ids: Sequence[int] | None
    """Segment of each token, for the backbones that have segments."""
    response: Sequence[int]
    """Where the response's tokens stand in the input, K of them."""
    spans: Sequence[Span]
    """The characters of the response text that each of them stands for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Renders and tokenises histories and responses for a reward model.

    The response is read with one leading space and none at its end, whatever its text has: byte-level tokenizers would
    otherwise see other tokens for a response that a policy sampled than for one that a file holds. Texts are texts: one that
    spells a special token, as a policy may from ordinary ones, is read as its characters, or as unknown by a tokenizer that
    cannot do that. Only what the tokenizer itself puts around them is special.
    """

    tokenizer: Any
    """A fast tokenizer: the projection of words needs its offsets."""
    template: str
    """Text of the history part; {history} is replaced by the queries."""
    separator: str
    """Text between the queries of a history."""
    max_tokens: int
    """Longest input; a longer one loses the oldest part of its history."""

    def __call__(self, histories: Sequence[Sequence[str]], responses: Sequence[str]) -> list[Encoded]:
        """Raises: UserError: a response that alone is longer than ``max_tokens``."""
        if not responses:
            return []
        head, _, tail = self.template.partition("{history}")
        firsts = [head + self.separator.join(map(self._clean, history)) + tail for history in histories]
        self.tokenizer.truncation_side = "left"
        try:
            out = self.tokenizer(
                firsts,
                [" " + text.strip() for text in responses],
                truncation="only_first",
                max_length=self.max_tokens,
                return_offsets_mapping=True,
                split_special_tokens=True,
            )
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise UserError(
                f"a response does not fit in the reward model's {self.max_tokens} tokens ({error}): train one with a "
                "larger data.max_tokens, or lower rollout.max_new_tokens"
            ) from None
        special = special_tokens(self.tokenizer).keys() - {self.tokenizer.unk_token_id}
        return [self._encoded(out, i, text, special) for i, text in enumerate(responses)]

    def _clean(self, query: str) -> str:
        """Single spaces, and no separator within a query, as in ``PromptBuilder``."""
        return " ".join(query.replace(self.separator.strip(), " ").split())

    def _encoded(self, out: Any, index: int, text: str, special: Set[int]) -> Encoded:
        lead = len(text) - len(text.lstrip()) - 1  # minus the space put in front
        parts = out.sequence_ids(index)  # None for what the tokenizer put in
        response = [i for i, part in enumerate(parts) if part == 1]
        offsets = out["offset_mapping"][index]
        types = out.get("token_type_ids")
        ids, unknown = out["input_ids"][index], self.tokenizer.unk_token_id
        if unknown is not None:  # a unigram tokenizer finds its special tokens in any text, whatever it was told
            ids = [unknown if part is not None and i in special else i for i, part in zip(ids, parts, strict=True)]
        return Encoded(
            input_ids=ids,
            token_type_ids=None if types is None else types[index],
            response=response,
            spans=[(max(offsets[i][0] + lead, 0), max(offsets[i][1] + lead, 0)) for i in response],
        )


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Id -> text of every token that is a sign to the model and no part of a text."""
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return named | {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}


class TokenModel(nn.Module):
    """A transformers token classifier and its reader.

    Causal backbones that allow it run packed, without padding; ``packed`` says whether this one does. All others run in
    right-padded batches of similar lengths.
    """

    def __init__(self, classifier: Any, reader: Reader) -> None:
        super().__init__()
        self.classifier = classifier
        self.reader = reader
        classifier.eval()
        self.hindsight = sees_later_tokens(classifier)
        self.packed = not self.hindsight and _can_pack(classifier)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def logits(self, batch: Sequence[Encoded]) -> Float[Tensor, "K 3"]:
        """Class logits of the response tokens of every input, one after the other, fp32."""
        run = _packed_logits if self.packed else _padded_logits
        return run(self.classifier, batch, self.device).float()

    @torch.no_grad()
    def probabilities(self, inputs: Sequence[Encoded], token_budget: int) -> list[Float[Tensor, "k 3"]]:
        """Class probabilities of each input's response tokens, on the CPU, fp32; ``token_budget`` bounds a batch."""
        self.classifier.eval()
        out: list[Tensor] = [torch.zeros(0, 3)] * len(inputs)
        for group in batches(inputs, token_budget, padded=not self.packed):
            parts = self.logits([inputs[i] for i in group]).softmax(-1).cpu()
            for i, part in zip(group, parts.split([len(inputs[i].response) for i in group]), strict=True):
                out[i] = part
        return out

    def save(self, folder: Path) -> None:
        """Write safetensors, config and tokenizer, as plain transformers loads them."""
        config = self.classifier.config
        implementation, config._attn_implementation = config._attn_implementation, "sdpa"
        try:
            self.classifier.save_pretrained(folder)
            self.reader.tokenizer.save_pretrained(folder)
        finally:
            config._attn_implementation = implementation


def batches(inputs: Sequence[Encoded], token_budget: int, *, padded: bool) -> Iterator[list[int]]:
    """Indices in groups of at most ``token_budget`` tokens, longest first.

    Padding counts where there is any, and an input shorter than ``LEAST_FILLED`` of its group's longest begins the next group.
    """
    group: list[int] = []
    load = width = 0
    for i in sorted(range(len(inputs)), key=lambda i: -len(inputs[i].input_ids)):
        length = len(inputs[i].input_ids)
        cost = (len(group) + 1) * max(width, length) if padded else load + length
        if group and (cost > token_budget or (padded and length < LEAST_FILLED * width)):
            yield group
            group, load, width = [], 0, 0
        group.append(i)
        load, width = load + length, max(width, length)
    if group:
        yield group


def load(
    path: str, device: torch.device | str, setting: str = "reward.model", *, trust_remote_code: bool = False
) -> tuple[TokenModel, dict[str, Any]]:
    """A frozen reward model and its record, from a folder that ``tppo-fast reward-model`` wrote.

    Raises:
        UserError: the folder or its record cannot be read, or holds something else.
    """
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    from tppo_fast.loading import STRICT, complete, in_short

    try:
        record = json.loads((Path(path) / RECORD).read_text())
        trust = {"trust_remote_code": trust_remote_code}
        reader = Reader(tokenizer=AutoTokenizer.from_pretrained(path, **trust), **record["reader"])
        classifier = complete(
            AutoModelForTokenClassification.from_pretrained(path, attn_implementation="sdpa", **trust, **STRICT)
        )
    except Exception as error:  # transformers raises many kinds for a bad folder
        reason = in_short(error) if Path(path).is_dir() else "no such folder"
        raise UserError(
            f"{setting} = {path!r}: no reward model could be loaded ({reason}); tppo-fast reward-model makes one"
        ) from None
    if classifier.config.num_labels != 3:
        raise UserError(f"{setting} = {path!r}: it has {classifier.config.num_labels} classes; a reward model has 3")
    return TokenModel(classifier.to(device).requires_grad_(False), reader), record


# ------------------------------------------------------------------------------------------------ forward passes


@torch.no_grad()
def sees_later_tokens(classifier: Any) -> bool:
    """Whether the scores of a token depend on the tokens after it: measured on one input, with its last token changed."""
    ids = _probe(classifier)[:1]
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % _vocabulary(classifier)
    before, after = (classifier(input_ids=x, attention_mask=torch.ones_like(x)).logits[0, :-1] for x in (ids, changed))
    return (before - after).abs().max().item() > 1e-5


@torch.no_grad()
def _can_pack(classifier: Any) -> bool:
    """Switch a causal classifier to packed attention if that gives its own logits; else leave it as it is."""
    rows = _probe(classifier)
    inputs = [
        Encoded(input_ids=row[:length].tolist(), token_type_ids=None, response=range(cut, length), spans=[])
        for row, cut, length in zip((rows[0], rows[1], rows[0]), (5, 3, 5), (12, 7, 9), strict=True)
    ]
    own = _padded_logits(classifier, inputs, rows.device)
    attention.register()
    before = classifier.config._attn_implementation
    try:
        classifier.set_attn_implementation(attention.NAME)
        fits = (_packed_logits(classifier, inputs, rows.device) - own).abs().max().item() <= 1e-3
    except (TypeError, RuntimeError, ValueError):  # its layers do not take the layout
        fits = False
    if not fits:
        classifier.set_attn_implementation(before)
    return fits


def _probe(classifier: Any) -> Tensor:
    """[2, 12] token ids."""
    ids = torch.randint(0, _vocabulary(classifier), (2, 12), generator=torch.Generator().manual_seed(0))
    return ids.to(next(classifier.parameters()).device)


def _vocabulary(classifier: Any) -> int:
    return classifier.get_input_embeddings().weight.shape[0]


def _packed_logits(classifier: Any, batch: Sequence[Encoded], device: torch.device) -> Tensor:
    """Without padding, and with each distinct history only once, however many of the responses answer it."""
    made, index = SegmentLists(), []
    known: dict[tuple[int, ...], int] = {}  # history part -> its segment
    for encoded in batch:
        cut = encoded.response[0] if encoded.response else len(encoded.input_ids)
        history, rest = tuple(encoded.input_ids[:cut]), encoded.input_ids[cut:]
        if history and history not in known:
            known[history] = made.add(history)
        if rest:
            index += [len(made.tokens) + place - cut for place in encoded.response]
            made.add(rest, first_position=cut, parent=known.get(history, -1))
    segments = attention.Segments(
        token_ids=torch.tensor(made.tokens, device=device),
        cu_seqlens=torch.tensor(made.starts, dtype=torch.int32, device=device),
        prefix=torch.tensor(made.prefix, device=device),
    )
    layout = attention.build_layout(segments)
    ids, places = segments.token_ids[None], torch.tensor(made.positions, device=device)[None]
    out = classifier(input_ids=ids, position_ids=places, use_cache=False, layout=layout)
    return out.logits[0][torch.tensor(index, dtype=torch.int64, device=device)]


def _padded_logits(classifier: Any, batch: Sequence[Encoded], device: torch.device) -> Tensor:
    width = max(len(e.input_ids) for e in batch)
    padding = classifier.config.get_text_config().pad_token_id or 0

    def rows(values: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*v, *[fill] * (width - len(v))] for v in values], device=device)

    ids = rows([e.input_ids for e in batch], padding)
    inputs = {"input_ids": ids, "attention_mask": rows([[1] * len(e.input_ids) for e in batch], 0)}
    types = [e.token_type_ids for e in batch if e.token_type_ids is not None]
    if len(types) == len(batch):
        inputs["token_type_ids"] = rows(types, 0)
    places = [n * width + i for n, e in enumerate(batch) for i in e.response]
    index = torch.tensor(places, dtype=torch.int64, device=device)
    return classifier(**inputs).logits.flatten(0, 1)[index]
