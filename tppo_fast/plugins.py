"""``module:function`` in the config -> the object, or one sentence that says why not."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tppo_fast.errors import UserError

T = TypeVar("T")

CALLED_WITH = {
    "reward.source": ("rollouts",),
    "ppo.loss": ("evaluation", "batch", "config", "kl_coef", "train_policy"),
    "rollout.engine": ("config", "tokenizer", "device"),
    "--judge": ("history", "next_queries", "response_text"),
    "--pair-judge": ("history", "next_queries", "first", "second"),
}
"""Setting -> what the object it names is called with, in this order."""


def load_object(spec: str, setting: str) -> Callable[..., Any]:
    """Import the callable that ``spec`` names.

    The current directory joins the END of the import path, for this process: a file beside the config is found, and
    cannot shadow an installed package.

    Args:
        spec: ``package.module:attribute``.
        setting: the config field it came from, for the messages.

    Raises:
        UserError: no ``module:attribute``, no such module, a module that fails to import, no such attribute, or one
            that cannot be called with what it will be, see ``CALLED_WITH``.
    """
    module_name, _, attribute = spec.partition(":")
    if not (module_name and attribute):
        raise UserError(f"{setting} = {spec!r}: write a built-in name or module:function")
    module = _import(module_name, f"{setting} = {spec!r}")
    if not hasattr(module, attribute):
        where = getattr(module, "__file__", None) or "a folder without __init__.py"
        raise UserError(f"{setting} = {spec!r}: module {module_name!r} ({where}) has no attribute {attribute!r}")
    loaded = getattr(module, attribute)
    if not callable(loaded):
        raise UserError(f"{setting} = {spec!r}: {attribute!r} is a {type(loaded).__name__}, not a function")
    if isinstance(loaded, type) and setting != "rollout.engine":
        raise UserError(f"{setting} = {spec!r} is a class: name a function, or an instance made from it")
    _check_signature(loaded, f"{setting} = {spec!r}", CALLED_WITH[setting])
    return loaded


def _check_signature(function: Callable[..., Any], field: str, passed: Sequence[str]) -> None:
    """Refuse a function that cannot be called so; what does not tell its signature may be any."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*passed)
    except TypeError as error:
        raise UserError(
            f"{field} takes {signature} and is called with ({', '.join(passed)}): {error}; write it with these arguments"
        ) from None


def guarded(function: Callable[..., T], field: str) -> Callable[..., T]:
    """``function``, whose failures become one sentence that names the setting it came from."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> T:
        try:
            return function(*args, **options)
        except (UserError, MemoryError):
            raise
        except Exception as error:
            raise UserError(f"{field} failed with {raised(error)}") from error

    return call


def _import(name: str, field: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()  # the file may be younger than the path's cached listing
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise UserError(
                f"{field}: there is no module {error.name!r}; install it, or start from the folder that holds it"
            ) from None
        raise UserError(f"{field}: importing {name!r} failed with {raised(error)}") from error
    except Exception as error:
        raise UserError(f"{field}: importing {name!r} failed with {raised(error)}") from error


def raised(error: BaseException) -> str:
    """An exception of a user's code in words: type, message, and the last file and line of the user's own, if there is one."""
    places = [
        (f.f_globals.get("__name__", "").partition(".")[0], f, n) for f, n in traceback.walk_tb(error.__traceback__)
    ]
    user = next((package for package, _, _ in places if package not in ("tppo_fast", "importlib")), None)
    own = [f" at {frame.f_code.co_filename}:{line}" for package, frame, line in places if package == user]
    place = own[-1] if own else ""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}{f' ({message})' if message else ''}{place}"
