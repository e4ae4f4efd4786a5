"""Prompts for a judging LLM, from template files, and what its answer must look like.

A template is a TOML file with ``name``, ``version``, ``answer`` ("words": a 0/1 for every numbered word and one for the whole
response; "sentence": the latter alone), and ``system`` and ``user``, Jinja texts that see ``history``, ``next_queries``,
``response`` and ``words``; the filter ``quoted`` puts untrusted text in JSON quotes, and no marker of a chat format and nothing
invisible in it reaches the judge as such. Words are answered BY INDEX, so that a repeated word is judged in each of its places.
"""

from __future__ import annotations

import json
import re
import tomllib
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tppo_fast.data.rows import show
from tppo_fast.errors import UserError
from tppo_fast.labelling.judges import Item, digest
from tppo_fast.rewards.labels import Labels
from tppo_fast.rewards.segment import Segments

BUILT_IN = Path(__file__).with_name("templates")
ANSWERS = ("words", "sentence")
QUOTING = 2
"""Which way ``quoted`` writes a text; part of the labeller's identity, since it changes what the judge reads."""
Message = dict[str, str]


class MalformedAnswer(ValueError):
    """An answer that is not what was asked for; the message says what is wrong, for the next attempt and for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTemplate:
    """One template file."""

    name: str
    """From the file."""
    version: int
    """From the file; a change of the text should raise it, and changes ``sha256`` in any case."""
    answer: str
    """What is asked for: "words" or "sentence"."""
    sha256: str
    """Of the file's fields; part of the labeller's identity."""
    system: Template
    """The system message."""
    user: Template
    """The user message."""

    def messages(self, item: Item, segments: Segments) -> list[Message]:
        """The chat that asks for the labels of one response."""
        seen = {
            "history": item.history,
            "next_queries": item.next_queries,
            "response": item.response,
            "words": segments.flat,
        }
        try:
            texts = [(role, part.render(seen)) for role, part in (("system", self.system), ("user", self.user))]
        except TemplateError as error:
            raise UserError(f"--template {self.name}: {error}: it may use {', '.join(seen)}") from None
        return [{"role": role, "content": text.strip()} for role, text in texts if text.strip()]

    def schema(self, count: int) -> dict[str, Any]:
        """The JSON schema of an answer about ``count`` words: no other answer is valid."""
        binary = {"type": "integer", "enum": [0, 1]}
        fields: dict[str, Any] = {"sentence": binary}
        if self.answer == "words":
            fields = {"words": _object({str(n): binary for n in range(1, count + 1)}), **fields}
        return _object(fields)

    def parse(self, text: str, segments: Segments) -> Labels:
        """The labels an answer stands for; what the model thought before it, and one code fence around it, do not count.

        Raises:
            MalformedAnswer: it is not JSON, or does not have exactly one 0 or 1 for everything asked.
        """
        text = text.partition("</think>")[2] or text  # some endpoints leave the opening tag out
        if fenced := re.fullmatch(r"\s*```(?:json)?(.*)```\s*", text, re.DOTALL):
            text = fenced[1]
        try:
            answer = json.loads(text, object_pairs_hook=_unambiguous)
        except MalformedAnswer:
            raise
        except (ValueError, RecursionError) as error:
            raise MalformedAnswer(f"the answer is not JSON ({error})") from None
        expected = {"words", "sentence"} if self.answer == "words" else {"sentence"}
        if not isinstance(answer, dict) or set(answer) != expected:
            raise MalformedAnswer(f"the answer must be an object with {' and '.join(sorted(expected))}")
        sentence = _binary(answer["sentence"], "sentence")
        if self.answer == "sentence":
            return segments.labels([[sentence + 1] * len(words) for words in segments.words], sentence)
        return segments.labels(_word_classes(answer["words"], segments), sentence)


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise MalformedAnswer(f"the answer gives {show(key)} twice")
        found[key] = value
    return found


def _word_classes(words: Any, segments: Segments) -> list[list[int]]:
    count = len(segments.flat)
    wanted = [str(n) for n in range(1, count + 1)]
    if not isinstance(words, dict) or set(words) != set(wanted):
        got = len(words) if isinstance(words, dict | list) else show(words)
        raise MalformedAnswer(f"words must have one entry for each number from 1 to {count}, and got {got}")
    flat = iter([_binary(words[n], f"word {n}") + 1 for n in wanted])
    return [[next(flat) for _ in spans] for spans in segments.words]


def _binary(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value not in (0, 1):
        raise MalformedAnswer(f"{name} is {show(value)}, and must be 0 or 1")
    return value


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _quoted(value: object) -> str:
    """JSON in which no text can start a control token ("<|im_end|>", "[INST]") or hide: such characters are escapes."""
    return re.sub(
        r'"(?:[^"\\]|\\.)*"', lambda text: "".join(map(_plain, text[0])), json.dumps(value, ensure_ascii=False)
    )


def _plain(character: str) -> str:
    """The character, or its JSON escape."""
    if character not in "<>[]" and unicodedata.category(character) not in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"):
        return character
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4))


def load_template(name: str) -> PromptTemplate:
    """A built-in template by name ("token", "sentence"), or one's own by the path of its ``.toml`` file.

    Raises:
        UserError: no such template, or a field that is missing or wrong.
    """
    path = Path(name) if name.endswith(".toml") else BUILT_IN / f"{name}.toml"
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in BUILT_IN.glob("*.toml")))
        raise UserError(f"--template {name}: there is no such file; give a .toml file, or one of {known}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--template {name}: not a readable TOML file ({error})") from None
    kinds = {"name": str, "version": int, "answer": str, "system": str, "user": str}
    for field, kind in kinds.items():
        if not isinstance(fields.get(field), kind):
            raise UserError(f"--template {name}: {field} = {show(fields.get(field))}: give a {kind.__name__}")
    if fields["answer"] not in ANSWERS:
        raise UserError(f'--template {name}: answer = {show(fields["answer"])}: use "words" or "sentence"')
    sandbox = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=False, keep_trailing_newline=True)
    sandbox.filters["quoted"] = _quoted
    try:
        system, user = (sandbox.from_string(fields[role]) for role in ("system", "user"))
    except TemplateError as error:
        raise UserError(f"--template {name}: {error}") from None
    return PromptTemplate(
        name=fields["name"],
        version=fields["version"],
        answer=fields["answer"],
        sha256=digest({field: fields[field] for field in kinds}),
        system=system,
        user=user,
    )
