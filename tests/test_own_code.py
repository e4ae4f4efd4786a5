"""A model that brings its own code: refused unless trusted, and trusted again when the run is resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import planted
import pytest
import transformers
from support import write_model
from test_trainer import config
from transformers import AutoTokenizer, BertConfig, BertForTokenClassification

from tppo_fast import trainer
from tppo_fast.config import RewardConfig
from tppo_fast.errors import UserError
from tppo_fast.metrics import read_metrics
from tppo_fast.reward_model.run import train_reward_model
from tppo_fast.reward_model.settings import RewardModelConfig
from tppo_fast.rewards import TokenRewards, build_reward
from tppo_fast.sections import build_section

OWN_CODE = """
from transformers import {config}, {model}


class OwnConfig({config}):
    model_type = "own"


class OwnModel({model}):
    config_class = OwnConfig
"""


def bring_own_code(folder: Path, auto: str, config: str, model: str) -> Path:
    """Make the folder of a transformers model one that brings its own code."""
    (folder / "own_code.py").write_text(OWN_CODE.format(config=config, model=model))
    described = json.loads((folder / "config.json").read_text())
    described |= {
        "model_type": "own", "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own_code.OwnConfig", auto: "own_code.OwnModel"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def test_a_reward_model_of_a_backbone_with_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    write_model(tmp_path / "own", lambda size: BertForTokenClassification(BertConfig(vocab_size=size, **shape)))
    bring_own_code(tmp_path / "own", "AutoModelForTokenClassification", "BertConfig", "BertForTokenClassification")
    values = {
        "run_dir": str(tmp_path / "rm"),
        "resamples": 20,
        "backbone": {"path": str(tmp_path / "own"), "trust_remote_code": True},
        "data": {"labels": str(planted.write(tmp_path / "labels.jsonl", 80))},
        "train": {"epochs": 1},
    }
    made = train_reward_model(build_section(values, RewardModelConfig)).folder
    shutil.rmtree(tmp_path / "own")
    tok = AutoTokenizer.from_pretrained(made)

    def build(**settings: bool) -> TokenRewards:
        given = RewardConfig(source="model", model=str(made), **settings)
        return build_reward(given, tok, expected_length=9.0, separator=", ")

    with pytest.raises(UserError, match=r"reward\.model"):
        build()
    assert build(trust_remote_code=True).config.trust_remote_code


def test_a_run_of_a_model_with_its_own_code_resumes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    shutil.copytree(tiny_model, folder)
    bring_own_code(folder, "AutoModelForCausalLM", "LlamaConfig", "LlamaForCausalLM")
    with pytest.raises(UserError, match=r"model\.path"):
        trainer.train(config(folder, tmp_path / "r", ppo__lr_schedule="constant", train__steps=1))
    trusted = {"path": str(folder), "trust_remote_code": True}
    trainer.train(config(folder, tmp_path / "r", ppo__lr_schedule="constant", train__steps=1, model=trusted))
    shutil.rmtree(tmp_path / "r" / "policy")
    trainer.train(
        config(folder, tmp_path / "r", ppo__lr_schedule="constant", train__steps=2, model=trusted), resume=True
    )
    assert [row["step"] for row in read_metrics(tmp_path / "r")] == [0, 1, 2]
