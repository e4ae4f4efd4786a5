"""What every settings section is made of: field types, validation in one sentence, TOML files with overrides. Torch-free."""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from tppo_fast.errors import UserError
from tppo_fast.overrides import merge

Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1, le=100_000_000)]
OfStep = Annotated[int, Field(ge=1, le=100_000)]
"""A count of what one step holds."""
Passes = Annotated[int, Field(ge=1, le=1000)]
"""Over the same data."""


def _module_function(value: str) -> str:
    """A built-in name or ``module:function``."""
    module, _, function = value.partition(":")
    if ":" in value and not (module and function):
        raise ValueError("write a built-in name or module:function")
    return value


Pluggable = Annotated[str, AfterValidator(_module_function)]


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("must contain a character that is not a space")
    return value


NotBlank = Annotated[str, AfterValidator(_not_blank)]


def _one_history(value: str) -> str:
    if value.count("{history}") != 1:
        raise ValueError("must contain {history} exactly once")
    return value


Template = Annotated[str, AfterValidator(_one_history)]
TEMPLATE = "History:\n{history}\nNext queries:"
"""Around a history, unless a config says otherwise."""


def _expanded(value: Any) -> Any:
    """A path as text, with its user's home in place of ~."""
    if not isinstance(value, str | os.PathLike):
        return value
    return os.path.expanduser(value)  # noqa: PTH111 - Path would turn "" into "." and raise for a user it does not know


PathText = Annotated[str, BeforeValidator(_expanded)]
"""A path where a word may stand, too."""


class Section(BaseModel):
    """Settings that go together. Numbers are written as numbers and switches as true or false: nothing stands for another."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )

    def __init__(self, **values: Any) -> None:
        """Validate the settings given.

        Raises:
            UserError: the first problem, as ``build_section`` says it.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(_sentence(error, type(self), values)) from None

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # so that pydantic itself goes on without calling it

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
            raise ValueError("give it a number")
        if isinstance(value, str) and str not in kinds and kinds & {int, float}:
            raise ValueError("write a number, without quotes")
        if isinstance(value, str | int | float) and not isinstance(value, bool) and kinds - {type(None)} == {bool}:
            raise ValueError("write true or false")
        if isinstance(value, str) and Path in kinds and not value.strip():
            raise ValueError("give a path")
        return _expanded(value) if Path in kinds else value


def _kinds(annotation: Any) -> set[Any]:
    """The types that a field's annotation is made of; literals count as the types of their values."""
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    return {kind for part in get_args(annotation) for kind in _kinds(part)} or {annotation}


S = TypeVar("S", bound=Section)
Settings = Mapping[str, Any] | str | os.PathLike[str]
"""A nested dict of settings, or the path of a TOML file of them."""


def build_section(values: dict[str, Any], section: type[S]) -> S:
    """Validate a nested dict.

    Raises:
        UserError: the first problem, as one sentence with the field, its value and the remedy.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise UserError(_sentence(error, section, values)) from None


def read_toml(path: str | os.PathLike[str], what: str = "config") -> dict[str, Any]:
    """The values of a TOML file; the text "none" is None, as in the shell, since TOML has no word for it.

    Raises:
        UserError: unreadable file or bad TOML.
    """
    path = Path(path)
    if str(path).startswith("--"):
        raise UserError(f"{what} is missing: give the path of a TOML file first, then settings such as {path}")
    try:
        return _with_none(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{what} {str(path)!r} cannot be read ({reason}): give the path of a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{what} {str(path)!r} is not valid TOML: {error}") from None


def _with_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_none(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_none(inner) for inner in value]
    return None if value == "none" else value


def load_section(path: str | os.PathLike[str], overrides: list[str], section: type[S]) -> S:
    """A section from a TOML file, with ``--section.key value`` overrides from the command line.

    Raises:
        UserError: unreadable file, bad TOML, unknown key or bad value.
    """
    return build_section(merge(read_toml(path), overrides, lambda names: _is_text(section, names)), section)


def given(config: S | Settings, section: type[S]) -> S:
    """A config as it is, or made from what Python may give in its place.

    Raises:
        UserError: as ``build_section`` and ``load_section``; or it is none of these.
    """
    if isinstance(config, section):
        return config
    if isinstance(config, str | os.PathLike):
        return load_section(config, [], section)
    if isinstance(config, Mapping):
        return build_section(dict(config), section)
    raise UserError(f"config = {config!r}: give a {section.__name__}, a dict of settings, or the path of a TOML file")


def _is_text(section: type[Section], names: list[str]) -> bool:
    """Whether the setting of these names (["data", "train"]) takes a text or a path and nothing else."""
    field = section.model_fields.get(names[0])
    if field is None:
        return False
    if len(names) > 1:
        kind = field.annotation
        return isinstance(kind, type) and issubclass(kind, Section) and _is_text(kind, names[1:])
    return _kinds(field.annotation) <= {str, Path, type(None)}


def _sentence(error: ValidationError, section: type[Section], values: Mapping[str, Any]) -> str:
    """The first validation error in words; an unknown setting comes before others: it is what is missing, misspelt."""
    first = min(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")
    where = _place(first["loc"], values)
    if first["type"] == "extra_forbidden":
        names = [*section.model_fields, *_names(section)]
        near = difflib.get_close_matches(where, names, n=1, cutoff=0.5) or difflib.get_close_matches(
            where.rpartition(".")[2], [n.rpartition(".")[2] for n in names], n=1, cutoff=0.6
        )
        hint = f"did you mean {_full(near[0], names)!r}?" if near else f"there are {', '.join(section.model_fields)}"
        return f"unknown setting {where!r}: {hint}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and not isinstance(first["input"], str | int | float):
        return message  # a rule over several fields: its message already names them
    if first["type"] == "missing":
        choices = (
            f", give one of {', '.join(map(str, allowed))}" if (allowed := _choices(section, first["loc"])) else ""
        )
        return f"{where} is missing: it has no default{choices}"
    message = WORDS.get(first["type"], message)
    return f"{where} = {first['input']!r}: {message[:1].lower()}{message[1:]}"


def _place(loc: Sequence[int | str], values: Any) -> str:
    """The dotted name of a setting; one of several tables is called by its name."""
    where = ""
    for part in loc:
        if isinstance(part, int):
            values = values[part] if isinstance(values, Sequence) else None
            where += f"[{values.get('name', part)!r}]" if isinstance(values, Mapping) else f".{part}"
        else:
            values = values.get(part) if isinstance(values, Mapping) else None
            where += f".{part}"
    return where.removeprefix(".")


def _choices(section: type[Section], loc: Sequence[int | str]) -> tuple[Any, ...]:
    """The values that a setting may have, where they are few words."""
    kind: Any = section
    for part in loc:
        if isinstance(part, str):
            field = kind.model_fields[part].annotation
            kind = next((k for k in (field, *get_args(field)) if isinstance(k, type) and issubclass(k, Section)), field)
    return get_args(kind) if get_origin(kind) is Literal else ()


WORDS = {
    "path_type": "give a path, in quotes",
    "model_type": "this is a section; set one of its fields",
    "tuple_type": 'write a list: ["a", "b"], or one [[table]] for each where it lists settings',
    "too_short": "give at least one",
}
"""What pydantic would say in Python's words."""


def _full(name: str, names: list[str]) -> str:
    return name if name in names else next(n for n in names if n.rpartition(".")[2] == name)


def _names(section: type[Section], prefix: str = "") -> list[str]:
    """Dotted names of every setting."""
    names: list[str] = []
    for name, field in section.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        inner = next((k for k in kinds if isinstance(k, type) and issubclass(k, Section)), None)
        names += _names(inner, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return names


def by_name(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a dumped section under their dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= {f"{name}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {name: value}
    return found


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that a run keeps in a JSON file, to be compared with by ``first_change``.

    Raises:
        UserError: the file is damaged.
    """
    try:
        saved = json.loads(path.read_text())
        if not isinstance(saved, dict):
            raise ValueError("it holds no settings")
    except ValueError as error:
        raise UserError(f"{str(path)!r} is damaged ({error}): start again in another folder") from None
    return saved


def first_change(
    saved: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = ()
) -> tuple[str, Any, Any] | None:
    """The first setting that differs, as (dotted name, saved, now); None where none does but those and sections in ``free``."""
    saved, now = by_name(saved), by_name(now)
    for name in {**saved, **now}:
        if saved.get(name) != now.get(name) and not {name, name.partition(".")[0]} & {*free}:
            return name, saved.get(name), now.get(name)
    return None
