"""The shell: ``tppo-fast demo | sft | label | ...``.

Exit codes: 0 done, 1 failure, 2 usage or input, 130 interrupted, 141 whoever read the output has closed it.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from tppo_fast import __version__, preflight
from tppo_fast import config as settings
from tppo_fast.cli_convert import convert
from tppo_fast.cli_generate import generate
from tppo_fast.cli_label import label, refuse_endless
from tppo_fast.errors import EngineError, JobsFailed, LabellingFailed, ProcessFailed, TrainingDiverged, UserError
from tppo_fast.experiment_config import Experiment
from tppo_fast.finetune_config import DPOConfig, SFTConfig, read_run
from tppo_fast.interrupt import INTERRUPTED
from tppo_fast.reward_model.settings import RewardModelConfig
from tppo_fast.run_dir import REWARD_MODEL
from tppo_fast.sections import Section, build_section, load_section


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="tppo-fast")
def cli() -> None:
    """Token-level PPO for language models: a reward for every token, a token critic, one lean loop."""


class _WithSettings(click.Command):
    """A command whose --help also lists every setting that ``--section.key value`` can override."""

    settings: type[Section] = settings.Config

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (MemoryError, RuntimeError) as error:
            names = [name for _, rows in _settings_help(self.settings) for name, _ in rows]
            budget = next((name for name in names if name.endswith(".microbatch_tokens")), None)
            if budget and _out_of_memory(error):
                recompute = "--model.gradient_checkpointing"
                error.add_note(f"lower {budget}" + f", or set {recompute} true" * (recompute in names))
            raise

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        for title, rows in _settings_help(self.settings):
            with formatter.section(title):
                formatter.write_dl(rows)


def _settings_help(section: type[Section], prefix: str = "") -> Iterator[tuple[str, list[tuple[str, str]]]]:
    rows, nested = [], []
    for name, field in section.model_fields.items():
        default = field.default
        if isinstance(default, Section):
            nested.append((type(default), f"{prefix}{name}."))
        else:
            shown = repr(str(default)) if isinstance(default, Path) else repr(default)
            shown = "required" if field.is_required() else shown
            rows.append((f"--{prefix}{name}", f"{field.description} [{shown}]"))
    yield (f"Settings: {prefix.rstrip('.')}" if prefix else "Settings"), rows
    for kind, inner in nested:
        yield from _settings_help(kind, inner)


class _WithSFTSettings(_WithSettings):
    settings = SFTConfig


class _WithDPOSettings(_WithSettings):
    settings = DPOConfig


class _WithRewardModelSettings(_WithSettings):
    settings = RewardModelConfig


def _configured(kind: type[_WithSettings]) -> Callable[[Callable[..., None]], click.Command]:
    """A command that takes CONFIG, overrides and --resume."""

    def decorate(function: Callable[..., None]) -> click.Command:
        resume = click.option("--resume", is_flag=True, help="Continue the newest checkpoint in run_dir, bit for bit.")
        words = click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[--section.key value]...")
        config = click.argument("config", type=click.Path())
        command = cli.command(cls=kind, context_settings={"ignore_unknown_options": True})
        return command(config(words(resume(function))))

    return decorate


@_configured(_WithSFTSettings)
def sft(config: str, overrides: tuple[str, ...], resume: bool) -> None:
    """Fine-tune a policy on sessions (history -> next queries; SFT) as CONFIG (a TOML file) says."""
    loaded = load_section(config, list(overrides), SFTConfig)
    preflight.check(loaded, resume)
    quiet_libraries()
    from tppo_fast.sft import sft as run

    result = run(loaded, resume=resume)
    click.echo(f"SFT policy: {result.policy} (step {result.step})\nmetrics: {result.run_dir / 'metrics.jsonl'}")
    click.echo(
        f"held-out perplexity: {result.evaluation['eval/perplexity']:.3f} "
        f"({result.evaluation['eval/loss']:.3f} nats per token), relevance: {result.evaluation['eval/relevance']:.3f}"
    )


@_configured(_WithDPOSettings)
def dpo(config: str, overrides: tuple[str, ...], resume: bool) -> None:
    """Train a policy by DPO on pairs of true next queries and its own output, as CONFIG (a TOML file) says."""
    loaded = load_section(config, list(overrides), DPOConfig)
    preflight.check(loaded, resume)
    quiet_libraries()
    from tppo_fast.dpo import dpo as run

    result = run(loaded, resume=resume)
    click.echo(f"trained policy: {result.policy} (step {result.step})\nmetrics: {result.run_dir / 'metrics.jsonl'}")
    click.echo(f"held-out relevance: {result.evaluation['eval/relevance']:.3f}")


@_configured(_WithSettings)
@click.option(
    "--profile", type=click.IntRange(0), default=0, metavar="N", help="Trace N steps into run_dir/trace.json.gz."
)
@click.option("--memory-snapshot", is_flag=True, help="Write torch's snapshot of the GPU's memory into run_dir.")
def train(config: str, overrides: tuple[str, ...], resume: bool, profile: int, memory_snapshot: bool) -> None:
    """Train a policy by token-level PPO as CONFIG (a TOML file) says."""
    loaded = settings.load(config, list(overrides))
    preflight.check(loaded, resume)
    quiet_libraries()
    from tppo_fast.trainer import train as run

    result = run(loaded, resume=resume, profile=profile, memory_snapshot=memory_snapshot)
    click.echo(f"trained policy: {result.policy}\nmetrics: {result.run_dir / 'metrics.jsonl'}")
    click.echo(f"held-out relevance: {result.evaluation['eval/relevance']:.3f}")


@_configured(_WithRewardModelSettings)
def reward_model(config: str, overrides: tuple[str, ...], resume: bool) -> None:
    """Train a token-level reward model on labelled responses as CONFIG (a TOML file) says."""
    loaded = load_section(config, list(overrides), RewardModelConfig)
    preflight.check(loaded, resume, REWARD_MODEL)
    quiet_libraries()
    from tppo_fast.reward_model.run import train_reward_model

    result = train_reward_model(loaded, resume=resume)
    click.echo(f"{result.verdict}\nreward model: {result.folder}")


@cli.command(cls=_WithSettings, context_settings={"ignore_unknown_options": True})
@click.argument("config", type=click.Path())
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[--section.key value]...")
def plan(config: str, overrides: tuple[str, ...]) -> None:
    """Say how much memory a training run of CONFIG will take, phase by phase, without loading a weight."""
    loaded = settings.load(config, list(overrides))
    quiet_libraries()
    from tppo_fast.planner import describe
    from tppo_fast.planner import plan as run

    click.echo(describe(run(loaded)))


class _WithExperiment(_WithSettings):
    settings = Experiment


@cli.command(cls=_WithExperiment, context_settings={"ignore_unknown_options": True})
@click.argument("experiment", type=click.Path())
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[--section.key value]...")
def compare(experiment: str, overrides: tuple[str, ...]) -> None:
    """Train every method of EXPERIMENT (a TOML file) with every seed from one start, and report how they compare.

    Run again, it continues: finished jobs stay, an interrupted one resumes, a failed one is tried again.
    """
    loaded = load_section(experiment, list(overrides), Experiment)
    quiet_libraries()
    from tppo_fast.compare import compare as run

    run(loaded)


@cli.command()
@click.argument("policies", nargs=-1, required=True, metavar="[NAME=]FOLDER...")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Held-out sessions (.jsonl or .parquet).")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/evaluation"), show_default=True)
@click.option(
    "--config",
    type=click.Path(),
    help="A run's TOML file, for its data, rollout and model settings. [data: the first policy's]",
)
@click.option("--responses", type=click.IntRange(1), default=1, show_default=True, help="Responses to each session.")
@click.option(
    "--judge", default="lexical", show_default=True, help='"lexical", "embedding", or module:object of a labeller.'
)
@click.option(
    "--embedding", type=click.Path(path_type=Path), help="A sentence encoder, for the similarity and that judge."
)
@click.option("--pair-judge", help="module:function that compares two responses; it is asked in both orders.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=None, help="Of sampling and resampling.")
@click.option("--fresh", is_flag=True, help="Replace the evaluation of something else in --out.")
def evaluate(policies: tuple[str, ...], config: str | None, seed: int | None, **options: Any) -> None:
    """Compare policies on held-out sessions, each against each, with intervals. A NAME given twice is two seeds of one."""
    whole = {} if config is None else read_run(config)
    kept = {name: value for name, value in whole.items() if name in settings.RunConfig.model_fields}
    if seed is not None:
        kept["seed"] = seed
    loaded = build_section(kept, settings.RunConfig)
    quiet_libraries()
    from tppo_fast.evaluate_command import run

    run(loaded, policies, own_prompts=config is None, **options)


@cli.command()
@click.option("--run-dir", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True)
@click.option("--model", default="", help="Start from this causal LM instead of a small one made on the spot.")
@click.option("--data", default="synthetic", show_default=True, help="Sessions: a .jsonl or .parquet file.")
@click.option("--sessions", type=click.IntRange(20), default=None, help="How many sessions to generate. [8000]")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True)
@click.option("--sft-steps", type=click.IntRange(0), default=None, help="SFT steps before PPO. [700; --model: 40]")
@click.option("--steps", type=click.IntRange(1), default=None, help="PPO steps of each method. [60; --model: 10]")
@click.option(
    "--lr", type=click.FloatRange(0, min_open=True), default=None, help="PPO learning rate. [1e-3; --model: 1e-5]"
)
@click.option("--rollout", type=click.Choice(["hf", "vllm"]), default="hf", show_default=True, help="Who samples.")
@click.option("--fresh", is_flag=True, help="Remove an earlier demo in run-dir and start again.")
def demo(**options: Any) -> None:
    """Fine-tune a small model on search sessions (SFT), train it with TPPO and with PPO on the last token, and compare."""
    refuse_endless(options)
    quiet_libraries()
    from tppo_fast.demo import DemoSettings, run_demo

    run_demo(DemoSettings(**{name: value for name, value in options.items() if value is not None}))


cli.add_command(generate)
cli.add_command(label)
cli.add_command(convert)


@cli.command()
def metrics() -> None:
    """Define every metric that runs log, with its unit."""
    from tppo_fast.metrics import GLOSSARY

    width = max(map(len, GLOSSARY)) + 2
    for name, meaning in GLOSSARY.items():
        click.echo(f"{name:{width}}{meaning}")


@cli.command()
def doctor() -> None:
    """Say what this machine has, what each missing part costs, and how to get it."""
    from tppo_fast.doctor import diagnose, render

    sys.exit(render(diagnose()))


def quiet_libraries() -> None:
    """Our own progress is enough; and nothing is looked up on a hub for a local folder."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("torchao", "torch.utils._pytree"):  # torchao tells of GPU parts that do not fit, and torch of torchao
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def run(command: Callable[[], Any]) -> int:
    """Run a command and turn how it ended into an exit code and at most one sentence on stderr."""
    out = sys.stdout
    try:
        command()
    except click.exceptions.Abort as error:  # click's word for a KeyboardInterrupt of the command
        return _say(str(error.__cause__ or "") or INTERRUPTED, 130)
    except SystemExit as exit_:
        if sys.stdout is not out or isinstance(exit_.__context__, BrokenPipeError):
            return 141  # click, which wraps such an output, or rich has found that nobody reads it any more
        raise
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except UserError as error:
        return _say(f"error: {error}", 2)
    except (EngineError, JobsFailed, LabellingFailed, ProcessFailed, TrainingDiverged) as error:
        return _say("; ".join([f"error: {error}", *_notes(error)]), 1)
    except KeyboardInterrupt as error:
        return _say(str(error) or INTERRUPTED, 130)
    except OSError as error:
        said = "; ".join([f"{error}: check the path, the permissions and the free space", *_notes(error)])
        return _say(f"error: {said}", 1)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        advice = _notes(error) or ["take a smaller model, or less data at once"]
        return _say(f"error: out of memory: {'; '.join(advice)}", 1)
    return 0


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "out of memory" in str(error).lower()


def _notes(error: Exception) -> list[str]:
    return getattr(error, "__notes__", [])


def _say(sentence: str, code: int) -> int:
    click.echo(" ".join(sentence.split()), err=True)
    return code
