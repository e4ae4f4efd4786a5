"""What can be said of a model's folder without loading it. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path

from tppo_fast.errors import UserError


def check(path: str, setting: str) -> None:
    """Refuse what cannot be a model's folder, nor its name on the hub.

    Raises:
        UserError: no path, a path to nothing, an adapter, or a folder without safetensors.
    """
    field, folder = f"{setting} = {path!r}", Path(path)
    if not path:
        raise UserError(f"{field}: give the folder of a transformers causal LM (tppo-fast demo makes one)")
    if not folder.exists() and (folder.is_absolute() or path.startswith(".") or path.count(os.sep) > 1):
        raise UserError(f"{field}: there is no such folder; give the path of a model folder, or a name on the hub")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{field}: it is an adapter and no whole model: merge it into its base by peft (merge_and_unload), and save that "
            "with save_pretrained"
        )
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickles = any(folder.glob("*.bin"))
        remedy = (
            "its weights are pickles, which are not loaded; if you trust them, load them with transformers and save them with "
            "save_pretrained, which writes safetensors"
        )
        raise UserError(f"{field}: {remedy if pickles else 'there are no weights: *.safetensors; give a whole model'}")
