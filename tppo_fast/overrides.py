"""Settings given in the shell, laid over those of the config file."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Callable
from datetime import date, datetime, time
from typing import Any

from tppo_fast.errors import UserError


def merge(
    values: dict[str, Any], overrides: list[str], is_text: Callable[[list[str]], bool] = lambda _: False
) -> dict[str, Any]:
    """Apply ``--a.b value`` / ``--a.b=value`` / ``--switch`` / ``--no-switch`` pairs to a nested dict.

    Where ``is_text`` says of ["a", "b"] that it takes a text, a number or date stays the word it was written as.
    """
    merged = copy.deepcopy(values)
    for key, text in _pairs(overrides):
        *sections, name = key.replace("-", "_").split(".")
        table = merged
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise UserError(f"--{key} {text}: {section!r} is a value, not a section, in the config file")
        value = _literal(text)
        stays = isinstance(value, int | float | date | datetime | time) and not isinstance(value, bool)
        table[name] = text if stays and is_text([*sections, name]) else value
    return merged


def _pairs(words: list[str]) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise UserError(f"argument {word!r} is not understood: overrides are written --section.key value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            else:
                head, dot, name = key.rpartition(".")
                key, value = (head + dot + name[3:], "false") if name.startswith("no-") else (key, "true")
        pairs.append((key, value))
    return pairs


def _literal(text: str) -> Any:
    """The TOML value a shell word stands for, else the word itself; none is None."""
    if text.lower() == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
