"""The recipes are valid, and the CPU ones run end to end at small size."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from tppo_fast import cli
from tppo_fast import config as settings

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize("name", ["cpu_train", "gpu40_1.7b", "gpu80_1.7b", "gpu80_7b_lora", "paper_7b"])
def test_every_recipe_is_a_valid_config(name: str) -> None:
    settings.load(RECIPES / f"{name}.toml")


def test_the_cpu_recipes_run(tiny_model: Path, tmp_path: Path) -> None:
    small = [
        "--train.steps", "1", "--train.eval_prompts", "2", "--train.tensorboard", "false", "--data.synthetic_sessions", "40",
        "--data.max_prompt_tokens", "180", "--threads", "1",
    ]  # fmt: skip
    first, second = tmp_path / "sft", tmp_path / "tppo"
    sft = ["sft", str(RECIPES / "cpu_sft.toml"), "--model.path", str(tiny_model), "--run_dir", str(first), *small]
    train = [
        "train",
        str(RECIPES / "cpu_train.toml"),
        "--model.path",
        str(first / "policy"),
        "--run_dir",
        str(second),
        *small,
    ]
    for words in (sft, train):
        done = CliRunner().invoke(cli.cli, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    assert (second / "policy" / "model.safetensors").exists()


def test_every_recipe_is_in_the_readme() -> None:
    text = (RECIPES / "README.md").read_text()
    assert all(f"`{path.name}`" in text for path in RECIPES.glob("*.toml"))
