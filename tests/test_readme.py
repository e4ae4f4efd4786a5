"""The README tells the truth: its code runs, its commands exist, its config is valid, its table is generated."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from tppo_fast import cli
from tppo_fast import config as settings
from tppo_fast.data.rows import parse_row

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_the_config_is_valid() -> None:
    (toml,) = blocks("toml")
    assert settings.build(tomllib.loads(toml)).ppo.lr == 1e-6


def test_the_row_is_a_session() -> None:
    import json

    (row,) = blocks("json")
    session = parse_row(json.loads(row), "README")
    assert session.next_queries


def test_the_python_entry_point_takes_these_arguments() -> None:
    code = next(b for b in blocks("python") if "train(Config" in b)
    arguments = re.search(r"train\(Config\((.*)\)\)", code)
    assert arguments is not None
    made = eval(f"Config({arguments.group(1)})", {"Config": settings.Config})
    assert made.model.path == "my-sft-model"


def test_the_reward_functions_run() -> None:
    code = next(b for b in blocks("python") if "def my_reward" in b)
    scope: dict = {}
    exec(code, scope)
    assert scope["my_reward"]([]) == scope["my_token_reward"]([]) == []


def test_the_ops_run() -> None:
    code = next(b for b in blocks("python") if "tppo_kernels" in b)
    scope: dict = {}
    exec(code, scope)
    assert torch.isfinite(scope["loss"])


@pytest.mark.parametrize("line", [b for block in blocks("sh") for b in block.splitlines()])
def test_the_shell_commands_exist(line: str) -> None:
    words = line.split("#")[0].split()
    assert words[0] == "tppo-fast"
    done = CliRunner().invoke(cli.cli, [words[1], "--help"])
    assert done.exit_code == 0
    for option in [w for w in words if w.startswith("--")]:
        assert option in done.output or option == "--resume"


def test_the_make_targets_exist() -> None:
    targets = set(re.findall(r"`?make ([a-z0-9-]+)", TEXT))
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_files_it_links_to_exist() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / link).exists(), link


def test_no_machine_paths_in_tracked_files() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".txt", ".json", ".cpp", ".h"} and path.name != Path(__file__).name:
            assert "/home/" not in path.read_text(), name
            assert sys.prefix not in path.read_text(), name
