"""SFT and DPO: the right loss and gradient, exact resume, a clean stop, the best policy kept."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support import actor_critic, hide_vllm_from_trl, prompt
from test_trainer import wait_for_step, write_toml

from tppo_fast import checkpoint, dpo, sft
from tppo_fast.errors import TrainingDiverged, UserError
from tppo_fast.finetune_config import DPOConfig, DPOSection, LearnConfig, SFTConfig
from tppo_fast.interrupt import Interrupted
from tppo_fast.metrics import GLOSSARY, read_metrics
from tppo_fast.rollout.hf_engine import HFEngine
from tppo_fast.sections import build_section


def values(folder: Path, run_dir: Path, section: str, **own: Any) -> dict[str, Any]:
    return {
        "run_dir": str(run_dir), "threads": 1, "device": "cpu", "model": {"path": str(folder)},
        "data": {"synthetic_sessions": 40, "max_prompt_tokens": 180}, "rollout": {"max_new_tokens": 8},
        "train": {"steps": 6, "eval_every": 2, "eval_prompts": 4, "save_every": 2, "tensorboard": False},
        section: {"batch_size": 4, "lr": 3e-3, "lr_warmup_steps": 1, **own},
    }  # fmt: skip


def learned(run_dir: Path) -> list[tuple[float, ...]]:
    names = ("fit/loss", "fit/grad_norm", "fit/lr")
    return [tuple(row[name] for name in names) for row in read_metrics(run_dir) if row["step"] > 0]


@pytest.fixture(scope="module")
def supervised(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("sft") / "whole"
    sft.sft(values(tiny_model, run_dir, "sft"))  # a dict, as train takes
    return run_dir


def test_sft_learns_evaluates_and_leaves_a_policy(supervised: Path) -> None:
    rows = read_metrics(supervised)
    assert [row["step"] for row in rows] == list(range(7))
    assert {name for row in rows for name in row} - {"step"} <= set(GLOSSARY)
    assert [row["step"] for row in rows if "eval/perplexity" in row] == [0, 2, 4, 6]
    assert rows[6]["eval/loss"] < rows[0]["eval/loss"] - 0.3
    assert rows[6]["eval/perplexity"] == pytest.approx(math.exp(rows[6]["eval/loss"]))
    transformers.AutoModelForCausalLM.from_pretrained(supervised / "policy")


def test_the_loss_is_that_of_each_response_alone() -> None:
    actor = actor_critic().actor
    examples = [(prompt([5, 6, 7]), [8, 9, 0]), (prompt([3]), [4, 0])]
    objective = sft.Supervision(actor, examples, examples, LearnConfig(batch_size=2, microbatch_tokens=16), 0)
    got = objective.gradient(0)
    mine = {name: p.grad.clone() for name, p in actor.named_parameters() if p.grad is not None}
    actor.zero_grad()
    actor.lm.set_attn_implementation("eager")
    total = torch.zeros(())
    for p, response in examples:
        ids = [*p.token_ids, *response]
        labels = torch.tensor([[-100] * len(p.token_ids) + list(response)])
        loss = actor.lm(input_ids=torch.tensor([ids]), labels=labels).loss  # transformers' own: mean over the response
        total = total + loss * len(response)
    total = total / 5
    total.backward()
    assert got["fit/loss"] == pytest.approx(total.item(), rel=1e-5)
    for name, p in actor.named_parameters():
        torch.testing.assert_close(mine[name], p.grad, atol=1e-6, rtol=1e-4)


def test_the_best_policy_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    """Far too large a step after the warm-up: the held-out loss rises, and the start is what is left."""
    config = build_section(values(tiny_model, tmp_path / "r", "sft", lr=3.0, lr_warmup_steps=0), SFTConfig)
    result = sft.sft(config)
    rows = read_metrics(tmp_path / "r")
    assert (
        result.step == min((row for row in rows if "eval/loss" in row), key=lambda row: row["eval/loss"])["step"] == 0
    )
    before = transformers.AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    after = transformers.AutoModelForCausalLM.from_pretrained(result.policy).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_sft_resumes_bit_for_bit(tiny_model: Path, supervised: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    shutil.copytree(supervised, run_dir)
    for left in (run_dir / "policy", checkpoint.list_checkpoints(run_dir)[-1]):
        shutil.rmtree(left)
    config = build_section(values(tiny_model, run_dir, "sft"), SFTConfig)
    sft.sft(config, resume=True)  # from step 4
    assert learned(run_dir) == learned(supervised)
    weights = [(r / "policy" / "model.safetensors").read_bytes() for r in (run_dir, supervised)]
    assert weights[0] == weights[1]
    with pytest.raises(UserError, match=r"sft\.lr = 0\.5"):
        sft.sft(build_section(values(tiny_model, run_dir, "sft", lr=0.5), SFTConfig), resume=True)


def test_what_a_killed_run_found_best_later_is_not_taken_for_what_its_checkpoint_names(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(run_dir: Path, select: str = "best", **train: int) -> SFTConfig:
        given = values(tiny_model, run_dir, "sft", lr=0.1, lr_schedule="constant", select=select)
        given["train"] |= {"eval_prompts": 1, "save_every": 5, **train}
        return build_section(given, SFTConfig)

    def killed_at_9(self: Any, step: int) -> Any:
        if step == 9:
            raise KeyboardInterrupt
        return gradient(self, step)

    def best() -> list[str]:
        return sorted(path.name for path in (tmp_path / "r").glob("*best-*"))

    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "best-2024.txt").write_text("mine")
    gradient = sft.Supervision.gradient
    third = sft.sft(config(tmp_path / "third", select="last", steps=3, eval_every=0)).policy
    losses = iter([5.0, 4.0, 3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 0.5, 2.0])  # of steps 0 to 9, and of 7 again
    monkeypatch.setattr(sft.Supervision, "evaluate", lambda _: {"eval/loss": next(losses)})
    monkeypatch.setattr(sft.Supervision, "gradient", killed_at_9)
    with pytest.raises(KeyboardInterrupt):
        sft.sft(config(tmp_path / "r", steps=30, eval_every=1))
    assert best() == ["best-000003", "best-000009", "best-2024.txt"]  # the checkpoint of step 5 names one; the best now
    (tmp_path / "r" / ".best-000009.1.tmp").mkdir()
    result = sft.sft(config(tmp_path / "r", steps=7, eval_every=0), resume=True)
    assert result.step == 3
    assert (result.policy / "model.safetensors").read_bytes() == (third / "model.safetensors").read_bytes()
    assert best() == ["best-000003", "best-2024.txt"]
    shutil.rmtree(tmp_path / "r" / "best-000003")
    with pytest.raises(UserError, match="best-000003, which it names, is gone"):
        sft.sft(config(tmp_path / "r", steps=8, eval_every=0), resume=True)


def test_sigterm_saves_and_exits_130(tiny_model: Path, supervised: Path, tmp_path: Path) -> None:
    path, run_dir = tmp_path / "c.toml", tmp_path / "r"
    given = values(tiny_model, run_dir, "sft")
    given["train"]["save_every"] = 0
    write_toml(path, given)
    command = [sys.executable, "-m", "tppo_fast", "sft", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for_step(run_dir, 1, process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "--resume" in err
    sft.sft(build_section(given, SFTConfig), resume=True)
    assert learned(run_dir) == learned(supervised)


@pytest.mark.parametrize(("where", "loss", "step"), [("gradient", "fit/loss", 1), ("evaluate", "eval/loss", 0)])
def test_divergence_is_said_and_leaves_no_policy(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, loss: str, step: int
) -> None:
    monkeypatch.setattr(sft.Supervision, where, lambda *_: {loss: math.nan})
    with pytest.raises(TrainingDiverged, match=rf"step {step}.*sft\.lr"):
        sft.sft(build_section(values(tiny_model, tmp_path / "r", "sft"), SFTConfig))
    assert not (tmp_path / "r" / "policy").exists()
    assert (tmp_path / "r" / f"diverged_step_{step:06d}.json").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"data": {"synthetic_sessions": 40, "max_prompt_tokens": 250}, "rollout": {"max_new_tokens": 250}},
            "positions",
        ),
        ({"sft": {"microbatch_tokens": 16}}, "microbatch_tokens = 16"),
        ({"model": {"path": ""}}, "model.path"),
        ({"sft": {"learning_rate": 1.0}}, "sft.lr_"),
    ],
)
def test_bad_input_is_one_sentence(tiny_model: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        sft.sft(build_section(values(tiny_model, tmp_path / "r", "sft") | changes, SFTConfig))


# ---------------------------------------------------------------- DPO


def test_dpo_loss_by_hand() -> None:
    # log-ratios: chosen 1 - 0.5 = 0.5, rejected -1 - 0 = -1; beta 2: margin 2 (0.5 + 1) = 3
    one = torch.ones(1)
    losses, good, bad = dpo.dpo_loss(one, -one, 0.5 * one, 0 * one, beta=2.0)
    assert (float(good), float(bad)) == (1.0, -2.0)
    assert float(losses) == pytest.approx(math.log1p(math.exp(-3.0)))
    smoothed, _, _ = dpo.dpo_loss(one, -one, 0.5 * one, 0 * one, beta=2.0, smoothing=0.25)
    assert float(smoothed) == pytest.approx(0.75 * math.log1p(math.exp(-3.0)) + 0.25 * math.log1p(math.exp(3.0)))


def moved_preference(share: bool, microbatch_tokens: int = 64) -> dpo.Preference:
    """Three pairs, and a policy a little away from its reference."""
    actor = actor_critic().actor
    reference = actor.frozen_copy()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in actor.parameters():
            p.add_(0.03 * torch.randn(p.shape, generator=g))
    shapes = [(5, 3, 4), (2, 6, 1), (7, 2, 2)]
    draw = lambda n: torch.randint(1, 300, (n,), generator=g).tolist()  # noqa: E731
    pairs = [dpo.Pair(prompt=prompt(draw(a)), chosen=draw(b), rejected=draw(c)) for a, b, c in shapes]
    settings = DPOSection(batch_size=3, beta=0.3, microbatch_tokens=microbatch_tokens)
    return dpo.Preference(
        actor=actor, reference=reference, pairs=pairs, held_out=pairs, settings=settings, seed=0, share_prompts=share
    )


@pytest.mark.parametrize("share", [False, True])
def test_dpo_equals_trl(share: bool) -> None:
    """TRL pads and computes on a grid; called without its trainer around it. Loss and every gradient agree."""
    pytest.importorskip("trl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hide_vllm_from_trl()
        from trl.trainer.dpo_trainer import DPOTrainer
    mine = moved_preference(share, microbatch_tokens=24)  # several microbatches
    got = mine.gradient(0)
    gradients = {name: p.grad.clone() for name, p in mine.actor.named_parameters() if p.grad is not None}
    mine.actor.zero_grad()
    rows = [(p.prompt.token_ids, p.chosen) for p in mine.pairs] + [(p.prompt.token_ids, p.rejected) for p in mine.pairs]
    width = max(len(a) + len(b) for a, b in rows)
    ids = torch.tensor([[*a, *b, *[0] * (width - len(a) - len(b))] for a, b in rows])
    mask = torch.tensor([[1] * (len(a) + len(b)) + [0] * (width - len(a) - len(b)) for a, b in rows])
    inside = torch.tensor([[0] * len(a) + [1] * len(b) + [0] * (width - len(a) - len(b)) for a, b in rows])
    for model in (mine.actor.lm, mine.reference.lm):
        model.set_attn_implementation("eager")
    fake = _Trainer(mine.actor.lm, mine.reference.lm, 0.3)
    inputs = {"input_ids": ids, "attention_mask": mask, "completion_mask": inside}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL asks transformers by a deprecated name
        theirs = DPOTrainer._compute_loss(fake, mine.actor.lm, inputs, False)
    theirs.backward()
    assert got["fit/loss"] == pytest.approx(theirs.item(), rel=1e-5)
    for name, p in mine.actor.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, atol=1e-6, rtol=1e-4)


class _Bin(dict):
    def __missing__(self, _: str) -> Any:
        return _Bin()

    def append(self, _: Any) -> None:
        return None


class _Trainer(SimpleNamespace):
    """As much of TRL's trainer as its loss reads."""

    def __init__(self, model: Any, reference: Any, beta: float) -> None:
        super().__init__(
            model=model, ref_model=reference, beta=beta, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=False,
            f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0], use_weighting=False,
            label_smoothing=0.0, args=SimpleNamespace(gradient_checkpointing_kwargs=None), _metrics=_Bin(),
            _total_train_tokens=0,
        )  # fmt: skip
        same = lambda x, **_: x  # noqa: E731
        self.accelerator = SimpleNamespace(
            device=torch.device("cpu"), gather=same, gather_for_metrics=same, reduce=same, num_processes=1
        )


def test_dpo_trains_and_resumes_bit_for_bit(tiny_model: Path, tmp_path: Path) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    result = dpo.dpo(build_section(values(tiny_model, whole, "dpo", max_pairs=16, lr=1e-3), DPOConfig))
    rows = read_metrics(whole)
    assert rows[1]["fit/loss"] == pytest.approx(math.log(2.0))  # policy and reference are still one
    assert rows[6]["fit/loss"] < rows[1]["fit/loss"]
    assert rows[6]["dpo/margin"] > 0
    assert {name for row in rows for name in row} - {"step"} <= set(GLOSSARY)
    shutil.copytree(whole, again)
    shutil.rmtree(again / "policy")
    shutil.rmtree(checkpoint.list_checkpoints(again)[-1])
    dpo.dpo(build_section(values(tiny_model, again, "dpo", max_pairs=16, lr=1e-3), DPOConfig), resume=True)
    assert learned(again) == learned(whole)
    weights = [(r / "policy" / "model.safetensors").read_bytes() for r in (again, whole)]
    assert weights[0] == weights[1]
    assert result.policy == whole / "policy"


def test_dpo_that_is_stopped_while_it_samples_goes_on_from_there(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(run_dir: Path) -> DPOConfig:
        return build_section(values(tiny_model, run_dir, "dpo", max_pairs=6) | {"train": {"steps": 1}}, DPOConfig)

    generate, calls = HFEngine.generate, iter(range(100))

    def stopped(*arguments: Any) -> Any:
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return generate(*arguments)

    monkeypatch.setattr(dpo, "CHUNK", 2)
    dpo.dpo(config(tmp_path / "whole"))
    monkeypatch.setattr(HFEngine, "generate", stopped)
    with pytest.raises(Interrupted, match="stopped with 4 of 6 done and saved; the same command goes on"):
        dpo.dpo(config(tmp_path / "r"))
    kept = (tmp_path / "r" / "own-output-train.jsonl").read_text()
    assert len(kept.splitlines()) == 4
    dpo.dpo(config(tmp_path / "r"))
    sampled = (tmp_path / "r" / "own-output-train.jsonl").read_text()
    assert sampled.startswith(kept)
    assert sampled == (tmp_path / "whole" / "own-output-train.jsonl").read_text()
    assert learned(tmp_path / "r") == learned(tmp_path / "whole")


def test_dpo_does_not_learn_from_what_another_policy_sampled(tiny_model: Path, tmp_path: Path) -> None:
    """A run that died before its first checkpoint leaves its samples behind; the next one may have another policy."""
    folder, run_dir = tmp_path / "model", tmp_path / "r"
    shutil.copytree(tiny_model, folder)
    config = build_section(values(folder, run_dir, "dpo", max_pairs=4) | {"train": {"steps": 1}}, DPOConfig)
    dpo.dpo(config)
    for left in (run_dir / "policy", run_dir / "checkpoints"):
        shutil.rmtree(left)
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        lm.model.norm.weight.mul_(1.5)
    lm.save_pretrained(folder)
    dpo.dpo(config)
    entries = [json.loads(line) for line in (run_dir / "own-output-train.jsonl").read_text().splitlines()]
    assert len({entry["key"] for entry in entries}) == len(entries) == 8


def test_dpo_refuses_pairs_that_may_not_fit_before_it_samples(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpo, "build_engine", None)
    given = values(tiny_model, tmp_path / "r", "dpo", microbatch_tokens=250)  # enough for one side
    with pytest.raises(UserError, match=r"^dpo\.microbatch_tokens = 250: a pair may need 4\d\d tokens; raise it"):
        dpo.dpo(build_section(given, DPOConfig))


def test_an_error_after_the_engine_started_ends_it(tiny_model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    closed: list[str] = []
    for module, section, run, kind in ((dpo, "dpo", dpo.dpo, DPOConfig), (sft, "sft", sft.sft, SFTConfig)):
        original = module.build_engine

        def watched(*a: Any, original: Any = original, section: str = section) -> Any:
            engine = original(*a)
            close = engine.close
            engine.close = lambda: (closed.append(section), close())
            return engine

        def broken(*_: Any, **__: Any) -> None:
            raise UserError("broken")

        monkeypatch.setattr(module, "build_engine", watched)
        monkeypatch.setattr("tppo_fast.runs.MetricsLogger", broken)
        with pytest.raises(UserError, match="broken"):
            run(build_section(values(tiny_model, tmp_path / section, section), kind))
    assert closed == ["dpo", "sft"]


def test_a_pair_must_fit() -> None:
    with pytest.raises(UserError, match=r"dpo\.microbatch_tokens = 16: a pair needs 18"):
        moved_preference(False, microbatch_tokens=16).gradient(0)


@pytest.mark.parametrize("section", ["sft", "dpo"])
def test_adapters_alone_learn_and_are_saved(section: str, tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    given = values(tiny_model, tmp_path / "r", section, select="last")
    given["model"] |= {"lora_rank": 2}
    given["train"] |= {"steps": 2, "keep_checkpoints": 1}
    run, kind = {"sft": (sft.sft, SFTConfig), "dpo": (dpo.dpo, DPOConfig)}[section]
    run(build_section(given, kind))  # type: ignore[operator]
    saved = checkpoint.list_checkpoints(tmp_path / "r")[-1] / "learned.safetensors"
    names = load_file(saved).keys()
    assert names
    assert all("lora_" in name for name in names)
    before = transformers.AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "r" / "policy").state_dict()
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])
