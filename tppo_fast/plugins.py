"""Settings of the form ``module:function``: the user's own rewards, losses and engines."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tppo_fast.errors import UserError


def load_object(spec: str, setting: str) -> Callable[..., Any]:
    """The callable that ``module:function`` names; the current folder is searched too.

    Raises:
        UserError: the module cannot be imported, or has no such callable.
    """
    module_name, _, name = spec.partition(":")
    if not (module_name and name):
        raise UserError(f"{setting} = {spec!r}: write a built-in name or module:function")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{setting} = {spec!r}: module {module_name!r} cannot be imported ({reason})") from None
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise UserError(f"{setting} = {spec!r}: module {module_name!r} has no callable {name!r}")
    return found
