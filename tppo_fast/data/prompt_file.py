"""``prompt.json`` in a policy's folder: how the prompts were written that it learned from. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tppo_fast.atomic import write_atomic
from tppo_fast.config import DataConfig
from tppo_fast.errors import UserError
from tppo_fast.sections import build_section

FILE = "prompt.json"
FIELDS = ("template", "response_prefix", "separator", "max_prompt_tokens", "num_queries")
"""Of ``DataConfig``."""
TEXTS = ("template", "response_prefix", "separator")
"""Those of which a policy notices a change."""


def write(folder: Path, data: DataConfig) -> None:
    """Say in ``folder`` what prompts its policy knows."""
    values = {name: getattr(data, name) for name in FIELDS}
    write_atomic(folder / FILE, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())


def read(folder: str | Path) -> dict[str, Any]:
    """Those settings by name; none where the folder does not say (a policy trained elsewhere, a name on the hub).

    Raises:
        UserError: the file holds something else.
    """
    path = Path(folder) / FILE
    try:
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict) or not values.keys() <= set(FIELDS):
            raise ValueError(f"its keys are not among {', '.join(FIELDS)}")
        build_section(values, DataConfig)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, UserError) as error:
        raise UserError(
            f"{str(path)!r} is damaged ({error}): mend it, or remove it to use the settings given"
        ) from None
    return values


def change(folder: str | Path, data: DataConfig) -> str:
    """What ``data`` says otherwise than the policy in ``folder`` has learned, in a few words; "" where nothing is known."""
    known = read(folder)
    for name in TEXTS:
        if known.get(name, now := getattr(data, name)) != now:
            return f"data.{name} = {now!r}, but the policy in {str(folder)!r} learned with {known[name]!r}"
    return ""
