"""What can be said against a run before torch is loaded: its folder, its files, its plug-ins. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tppo_fast import model_folder, run_dir
from tppo_fast.data.files import check_rows
from tppo_fast.errors import UserError
from tppo_fast.plugins import load_object
from tppo_fast.sections import Section, by_name

BUILT_IN = {"reward.source": ("lexical", "model"), "ppo.loss": ("ppo",), "rollout.engine": ("hf", "vllm")}
"""Setting -> the names that are no module:function."""
FILES = {"data.train": "session", "data.eval": "session", "data.labels": "labelled response"}
"""Settings that name a file of rows, and what a row is called."""


def check(config: Any, resume: bool, kind: run_dir.Kind = run_dir.POLICY) -> None:
    """Everything below, and the state of ``config.run_dir``.

    Raises:
        UserError: the first thing that is wrong.
    """
    run_dir.check(config, resume, kind)
    check_inputs(config)


def check_inputs(config: Section) -> None:
    """The files, the model's folder and the plug-ins that settings name; nothing of them is read as a whole.

    Raises:
        UserError: the first that cannot be used.
    """
    values = by_name(config.model_dump())
    if values.get("data.labels") == "":
        raise UserError("data.labels = '': give the file of labelled responses (tppo-fast label makes one)")
    for name, noun in FILES.items():
        if values.get(name) not in (None, "synthetic"):
            check_rows(Path(values[name]), noun)
    if "model.path" in values:
        model_folder.check(values["model.path"], "model.path")
    if values.get("backbone.path", "scratch") != "scratch":
        model_folder.check(values["backbone.path"], "backbone.path")
    check_plug_ins(config)


def check_plug_ins(config: Section) -> None:
    """The plug-ins that settings name.

    Raises:
        UserError: the first that cannot be loaded.
    """
    values = by_name(config.model_dump())
    for name, known in BUILT_IN.items():
        if name in values and values[name] not in known:
            load_object(values[name], name)
