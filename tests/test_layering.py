"""The arrows of CONTRIBUTING, the public names, and the rules that keep `kernels/` a folder."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import tppo_kernels

import tppo_fast

ROOT = Path(__file__).parents[1]

ALLOWED = {  # module of tppo_fast -> what of tppo_fast it may import; the arrows go one way
    "errors": set(),
    "estimates": set(),
    "atomic": {"errors"},
    "hashing": set(),
    "background": set(),
    "overrides": {"errors"},
    "sections": {"errors", "overrides"},
    "vllm_config": {"sections"},
    "reward_config": {"sections"},
    "config": {"errors", "reward_config", "sections", "vllm_config"},
    "words": set(),
    "plugins": {"errors"},
    "seeding": {"errors"},
    "interrupt": set(),
    "data_types": set(),
    "progress": set(),
    "metrics": {"atomic", "errors"},
    "attention_varlen": {"data_types"},
    "attention": {"attention_varlen", "data_types", "errors"},
    "packing": {"data_types", "errors"},
    "parity": {"config", "errors"},
    "flops": {"data_types"},
    "clock": set(),
    "compiling": set(),
    "profiling": {"errors"},
    "optimizers": {"config", "errors"},
    "offload": set(),
    "ahead": {"clock", "data_types", "rollout"},
    "advantages": {"config"},
    "algorithms": {"advantages", "config", "data_types", "errors"},
    "lora": {"config", "errors", "seeding"},
    "model_folder": {"errors"},
    "preflight": {"data", "errors", "model_folder", "plugins", "run_dir", "sections"},
    "run_dir": {"atomic", "errors", "hashing", "metrics", "progress", "sections"},
    "checkpoint": {
        "atomic", "config", "errors", "loading", "lora", "optimizers", "ppo", "run_dir", "sections", "seeding",
    },
    "loading": {"errors", "model_folder"},
    "model": {"attention", "config", "data_types", "errors", "loading", "lora", "packing"},
    "losses": {"config", "data_types", "errors", "model"},
    "team": {"data_types", "errors"},
    "child": {"errors", "interrupt"},
    "building": {
        "algorithms", "checkpoint", "compiling", "config", "losses", "model", "optimizers", "plugins", "ppo", "rollout", "runs",
        "seeding", "team",
    },
    "leader": {"child", "config", "data_types", "errors", "ppo", "team"},
    "shares": {"data_types", "errors", "leader", "rewards", "rollout", "seeding"},
    "follower": {"building", "child", "config", "data_types", "ppo", "rewards", "rollout", "runs", "team"},
    "follow": {"child", "cli", "follower"},
    "ppo": {
        "advantages", "algorithms", "config", "data_types", "errors", "flops", "losses", "metrics", "model", "offload",
        "optimizers", "packing", "parity", "seeding", "team",
    },
    "finetune_config": {"config", "sections"},
    "experiment_config": {"config", "finetune_config", "sections"},
    "planner": {"algorithms", "compiling", "config", "errors", "model", "optimizers"},
    "runs": {
        "atomic", "config", "data", "errors", "interrupt", "metrics", "progress", "rollout", "run_dir", "seeding",
    },
    "finetune": {
        "atomic", "checkpoint", "compiling", "config", "data", "data_types", "errors", "evaluate", "finetune_config", "interrupt",
        "metrics", "model", "optimizers", "progress", "rollout", "runs", "seeding",
    },
    "sft": {
        "config", "data", "data_types", "errors", "finetune", "finetune_config", "model", "packing", "preflight", "rollout",
        "run_dir", "runs", "sections", "seeding",
    },
    "dpo": {
        "algorithms", "compiling", "data_types", "errors", "finetune", "finetune_config", "hashing", "labelling", "model",
        "packing", "preflight", "rollout", "run_dir", "runs", "sections", "seeding", "sft",
    },
    "data": {"atomic", "config", "data_types", "errors", "sections", "words"},
    "generation": {"config", "data", "data_types", "errors", "loading", "rollout", "sections", "seeding", "words"},
    "rewards": {"attention", "config", "data_types", "errors", "hashing", "loading", "packing", "plugins", "progress", "words"},
    "labelling": {
        "atomic", "background", "data", "errors", "estimates", "generation", "hashing", "interrupt", "loading", "progress",
        "rewards", "sections", "words",
    },
    "reward_model": {
        "atomic", "checkpoint", "data", "errors", "estimates", "figures", "hashing", "interrupt", "labelling", "loading",
        "metrics", "preflight", "progress", "report", "rewards", "run_dir", "runs", "scratch", "sections", "seeding", "words",
    },
    "scratch": set(),
    "figures": {"report"},
    "rollout": {"background", "child", "config", "data_types", "errors", "interrupt", "loading", "plugins", "seeding"},
    "evaluate": {"data", "data_types", "errors", "estimates", "rewards", "words"},
    "report": {"atomic", "errors", "estimates", "metrics"},
    "judging": {"data_types", "errors", "rewards"},
    "panel": {
        "atomic", "config", "data", "data_types", "errors", "estimates", "evaluate", "judging", "loading", "progress", "rewards",
        "rollout", "runs", "words",
    },
    "evaluate_command": {
        "config", "data", "errors", "estimates", "labelling", "panel", "plugins", "progress", "report", "rewards",
    },
    "probing": set(),
    "doctor": {"probing"},
}  # fmt: skip


def imported(path: Path) -> set[str]:
    """Every module that a file imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def files(part: str) -> list[Path]:
    folder = ROOT / "tppo_fast" / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


@pytest.mark.parametrize("part", ALLOWED)
def test_arrows(part: str) -> None:
    for path in files(part):
        used = {n.split(".")[1] for n in imported(path) if n.startswith("tppo_fast.")} - {part}
        assert used <= ALLOWED[part], f"{path.name} imports {sorted(used - ALLOWED[part])}"


def test_every_module_has_its_place() -> None:
    top = {p.stem for p in (ROOT / "tppo_fast").glob("*.py")} | {
        p.parent.name for p in (ROOT / "tppo_fast").glob("*/__init__.py")
    }
    assert top == set(ALLOWED) | {
        "__init__",
        "__main__",
        "trainer",
        "demo",
        "jobs",
        "job_process",
        "compare",
        "cli",
        "cli_convert",
        "cli_generate",
        "cli_label",
    }


def test_kernels_import_nothing_of_the_trainer() -> None:
    for path in (ROOT / "kernels" / "tppo_kernels").rglob("*.py"):
        assert not [n for n in imported(path) if n.split(".")[0] in {"tppo_fast", "transformers", "vllm"}], path


def test_only_the_vllm_engine_imports_vllm() -> None:
    for path in (ROOT / "tppo_fast").rglob("*.py"):
        if path.name != "vllm_engine.py":
            assert not [n for n in imported(path) if n.split(".")[0] == "vllm"], path


def test_kernels_is_a_folder_and_shadows_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()
    code = "import importlib.util as u, sys; s = u.find_spec('kernels'); sys.exit('tppo' in str(s and s.origin))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_public_names() -> None:
    assert {
        "Config",
        "train",
        "TrainResult",
        "UserError",
        "EngineError",
        "ProcessFailed",
        "TrainingDiverged",
        "Interrupted",
        "generate",
    } == set(tppo_fast.__all__)
    for name in tppo_fast.__all__:
        assert callable(getattr(tppo_fast, name))
    with pytest.raises(AttributeError, match="nonsense"):
        tppo_fast.nonsense  # noqa: B018
    assert {"gae", "linear_logprobs", "logprobs_from_logits", "ppo_loss", "whiten"} <= set(tppo_kernels.__all__)
    assert tppo_kernels.__all__ == sorted(tppo_kernels.__all__)
    for name in tppo_kernels.__all__:
        assert getattr(tppo_kernels, name).__doc__


def test_no_pickles_are_loaded() -> None:
    for path in (ROOT / "tppo_fast").rglob("*.py"):
        text = path.read_text()
        assert "torch.load" not in text, path
        assert "import pickle" not in text, path
        assert "trust_remote_code=True" not in text, path


def test_an_endpoint_is_asked_without_torch() -> None:
    """Seconds before every command that needs none of it."""
    modules = "cli_label, labelling.run, labelling.llm, labelling.agreement, rewards.lexical"
    imports = ", ".join(f"tppo_fast.{name}" for name in modules.split(", "))
    subprocess.run([sys.executable, "-c", f"import sys, {imports}; sys.exit('torch' in sys.modules)"], check=True)
