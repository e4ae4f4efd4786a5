"""A model that brings its own code: refused unless trusted, and trusted again when the run is resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers
from test_trainer import config

from tppo_fast import trainer
from tppo_fast.errors import UserError
from tppo_fast.metrics import read_metrics

OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_run_of_a_model_with_its_own_code_resumes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    shutil.copytree(tiny_model, folder)
    (folder / "own_code.py").write_text(OWN_CODE)
    described = json.loads((folder / "config.json").read_text())
    described |= {
        "model_type": "own", "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"model\.path"):
        trainer.train(config(folder, tmp_path / "r", ppo__lr_schedule="constant", train__steps=1))
    trusted = {"path": str(folder), "trust_remote_code": True}
    trainer.train(config(folder, tmp_path / "r", ppo__lr_schedule="constant", train__steps=1, model=trusted))
    shutil.rmtree(tmp_path / "r" / "policy")
    trainer.train(
        config(folder, tmp_path / "r", ppo__lr_schedule="constant", train__steps=2, model=trusted), resume=True
    )
    assert [row["step"] for row in read_metrics(tmp_path / "r")] == [0, 1, 2]
