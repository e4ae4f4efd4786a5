"""The whole method in minutes on any machine: SFT of a small model, then TPPO and last-token PPO from the same start.

Both runs share model, data, seeds, sampling, token labels and optimizer. Last-token PPO gets the same token rewards summed
onto the last token, undiscounted: what differs is credit assignment (``METHODS``).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.table import Table

from tppo_fast import checkpoint, evaluate, finetune, loading, panel, report, scratch, sft, trainer
from tppo_fast import config as settings_module
from tppo_fast.atomic import atomic_folder, write_atomic
from tppo_fast.config import Config
from tppo_fast.data.baselines import PREDICTORS
from tppo_fast.data.prompts import PromptBuilder
from tppo_fast.data.sessions import Session, write_sessions
from tppo_fast.data_types import Rollout
from tppo_fast.errors import UserError
from tppo_fast.estimates import Estimate, cell, holm
from tppo_fast.figures import reward_histogram
from tppo_fast.finetune_config import LearnConfig
from tppo_fast.metrics import read_metrics
from tppo_fast.progress import Progress, say, table_console
from tppo_fast.rewards import CLASS_NAMES, build_reward, token_spans
from tppo_fast.sections import first_change, read_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "TPPO": {"reward": {"placement": "token"}, "ppo": {"gamma": 0.7}},
    "last-token PPO": {"reward": {"placement": "last"}, "ppo": {"gamma": 1.0}},
}
"""Method -> its own settings. A reward on every token allows a discount, which cuts the variance of later tokens; a single
reward on the last token would only be shrunk by it."""
TABLE = ("relevance", "hit", "mrr", "distinct", "valid", "copy", "length")
"""Columns of the final table."""
RESPONSES = 2
"""Responses to each held-out session in the final table."""
HISTOGRAM = 400
"""Responses of each policy whose token rewards the report shows as a histogram."""
More = Callable[[Sequence[Rollout]], evaluate.Scores]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """What fits a model: the small one learns from scratch, a pretrained one is a hundred times dearer."""

    sft_steps: int
    steps: int
    sft_batch: int
    sft_lr: float
    lr: float
    critic_lr: float
    prompts_per_step: int
    samples_per_prompt: int
    eval_prompts: int
    final_prompts: int
    shared_body: bool
    threads: int


SMALL = _Scale(
    sft_steps=700, steps=60, sft_batch=32, sft_lr=3e-3, lr=5e-4, critic_lr=3e-3,  # as in experiments/query_generation.toml
    prompts_per_step=32, samples_per_prompt=4, eval_prompts=200, final_prompts=10_000,
    shared_body=False, threads=1,  # small matrices: a second thread costs more than it brings
)  # fmt: skip
PRETRAINED = _Scale(
    sft_steps=40, steps=10, sft_batch=8, sft_lr=2e-5, lr=1e-5, critic_lr=3e-5,
    prompts_per_step=4, samples_per_prompt=2, eval_prompts=16, final_prompts=48,
    shared_body=True, threads=0,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """What a person may choose; the defaults finish in minutes on two CPU cores."""

    run_dir: Path = Path("runs/demo")
    """Everything the demo writes."""
    model: str = ""
    """A causal LM to start from; empty makes a small one with its own tokenizer."""
    data: str = "synthetic"
    """Sessions file, or the embedded generator."""
    sessions: int = 8000
    """Generated sessions, when no file is given."""
    seed: int = 0
    """Decides data, initialisation and sampling."""
    sft_steps: int | None = None
    """SFT steps before PPO, 0 takes the model as it is; None: 700 for the small model, 40 for your own."""
    steps: int | None = None
    """PPO steps of each method; None: 60 for the small model, 10 for your own."""
    lr: float | None = None
    """PPO learning rate, decaying linearly; None: 5e-4 for the small model, 1e-5 for a model of your own."""
    rollout: str = "hf"
    """Who samples: "hf" or "vllm"."""
    fresh: bool = False
    """Remove an earlier demo in ``run_dir`` first; other files there stay."""

    @property
    def scale(self) -> _Scale:
        """The model's scale with the choices of this demo."""
        base = PRETRAINED if self.model else SMALL
        chosen = {"sft_steps": self.sft_steps, "steps": self.steps, "lr": self.lr}
        return replace(base, **{name: value for name, value in chosen.items() if value is not None})


def run_demo(options: DemoSettings) -> dict[str, dict[str, Estimate]]:
    """Run (or continue) the demo; returns method -> metric -> estimate on held-out sessions, and writes the report.

    Raises:
        UserError: as ``open_folder``.
    """
    open_folder(options)
    if options.scale.threads:
        torch.set_num_threads(options.scale.threads)
    train_sessions, eval_sessions = sessions(options)
    start = supervised(options, train_sessions)
    configs = {name: run_config(options, start, name) for name in METHODS}
    for name, config in configs.items():
        if not (config.run_dir / "policy").is_dir():
            say(f"[bold]{name}[/]: {config.train.steps} steps of {config.rollout.prompts_per_step} prompts")
            trainer.train(config, resume=bool(checkpoint.list_checkpoints(config.run_dir)))
    evaluation = Evaluation(configs["TPPO"], start, train_sessions, eval_sessions[: options.scale.final_prompts])
    folders = {"start": start, **{name: config.run_dir / "policy" for name, config in configs.items()}}
    scores = evaluation.baselines(options.data == "synthetic") | evaluation.scores(folders)
    users = evaluation.users
    table = {name: evaluate.summarise(s, users, seed=options.seed) for name, s in scores.items()}
    verdicts = _verdicts(scores, users)
    verdicts.append("Intervals cover other users, not other seeds: this is one training run of each method.")
    _print_table(table, verdicts)
    path = options.run_dir / "report.html"
    _write_report(path, options, configs, table, verdicts, evaluation)
    say(f"report: {path}")
    return table


def open_folder(options: DemoSettings) -> None:
    """Make ``run_dir`` a demo's folder, without an earlier demo's results if they are to go.

    Raises:
        UserError: it holds a demo with other settings, or files that are no demo's and would be lost.
    """
    record = options.run_dir / "demo.json"
    own = _written(options.run_dir)
    for name, given in (("--data", options.data), ("--model", options.model)):
        if given and any(Path(given).resolve().is_relative_to(path.resolve()) for path in own):
            raise UserError(
                f"{name} = {given!r} lies where the demo in {str(options.run_dir)!r} writes: choose another --run-dir"
            )
    if not record.exists():
        found = sorted(options.run_dir.iterdir()) if options.run_dir.is_dir() else []
        if options.fresh and found:
            raise UserError(
                f"--run-dir {str(options.run_dir)!r} has a {found[0].name!r} but no demo, and --fresh removes an earlier demo "
                "alone: choose another folder, or empty it"
            )
        if foreign := [path for path in own if path in found]:
            raise UserError(
                f"--run-dir {str(options.run_dir)!r} has a {foreign[0].name!r} that no demo wrote: choose another folder, or "
                "move it"
            )
    elif options.fresh:
        for path in [*own, record]:  # the record last: what a kill leaves is then still a demo's
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    wanted = {k: str(v) for k, v in asdict(options).items() if k not in ("fresh", "run_dir")}
    if record.exists() and (changed := first_change(read_settings(record), wanted)):
        name, was, is_now = changed
        raise UserError(
            f"{name} = {is_now!r}, but the demo in {str(options.run_dir)!r} was started with {was!r}: use --fresh to "
            "start again, or another --run-dir"
        )
    try:
        options.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--run-dir {str(options.run_dir)!r} cannot be made ({error.strerror}): choose another"
        ) from None
    write_atomic(record, json.dumps(wanted, indent=2).encode())


def _written(run_dir: Path) -> list[Path]:
    """What a demo writes beside its record."""
    names = ["train.jsonl", "eval.jsonl", "untrained", "start", *map(_folder, METHODS), "report.html"]
    return [run_dir / name for name in [*names, *(f"report-{curve.slug}.png" for curve in report.CURVES)]]


def _folder(method: str) -> str:
    """Name of a method's folder in ``run_dir``."""
    return method.replace(" ", "-").lower()


def sessions(options: DemoSettings) -> tuple[list[Session], list[Session]]:
    """Training and held-out sessions, also written beside the runs."""
    data = {"train": options.data, "synthetic_sessions": options.sessions}
    config = settings_module.build({"seed": options.seed, "data": data})
    train_sessions, eval_sessions = trainer.load_sessions(config)
    for name, sessions in (("train", train_sessions), ("eval", eval_sessions)):
        write_sessions(options.run_dir / f"{name}.jsonl", sessions)
    return train_sessions, eval_sessions


def supervised(options: DemoSettings, sessions: Sequence[Session]) -> Path:
    """The starting policy: a supervised model in ``run_dir/start``."""
    start = options.run_dir / "start"
    if start.is_dir():
        return start
    base = Path(options.model) if options.model else small_model(options.run_dir / "untrained", sessions, options.seed)
    config = run_config(options, base, "TPPO")
    actor, _, builder = finetune.build(config)
    examples = list(zip(builder.prompts(sessions), builder.responses(sessions), strict=True))
    scale = options.scale
    if scale.sft_steps:
        say(f"[bold]SFT[/]: {scale.sft_steps} steps on {len(examples)} sessions")
        learn = LearnConfig(batch_size=scale.sft_batch, lr=scale.sft_lr)
        with Progress("sft", scale.sft_steps, "step") as progress:
            sft.supervise(
                actor, examples, learn, steps=scale.sft_steps, seed=options.seed,
                on_step=lambda loss: progress.update(1, loss=loss),
            )  # fmt: skip
    with atomic_folder(start) as temporary:
        actor.save(temporary, builder)
    return start


def small_model(folder: Path, sessions: Sequence[Session], seed: int) -> Path:
    """A random Llama of about a million parameters and a byte-level BPE tokenizer trained on the sessions."""
    from transformers import LlamaForCausalLM

    texts = [" " + q for s in sessions for q in (*s.history.get("search", ()), *s.next_queries)]
    tokenizer = scratch.byte_bpe([*texts, "History:\n", "Next queries:"])
    scratch.make(LlamaForCausalLM, scratch.llama_config(tokenizer), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_config(options: DemoSettings, start: Path, method: str) -> Config:
    """One method's run."""
    scale, own = options.scale, METHODS[method]
    return settings_module.build(
        {
            "run_dir": str(options.run_dir / _folder(method)),
            "seed": options.seed,
            "threads": scale.threads,
            "model": {"path": str(start), "shared_body": scale.shared_body},
            "data": {"train": str(options.run_dir / "train.jsonl"), "eval": str(options.run_dir / "eval.jsonl")},
            "rollout": {
                "engine": options.rollout,
                "prompts_per_step": scale.prompts_per_step,
                "samples_per_prompt": scale.samples_per_prompt,
                "max_new_tokens": 32,
            },
            "reward": {"scale": "binary", "length_penalty": False, **own["reward"]},
            "ppo": {
                "lr": scale.lr,
                "lr_schedule": "linear",
                "critic_lr": scale.critic_lr,
                "minibatches": 2,
                "value_clip": None,
                "value_warmup_steps": min(2, scale.steps - 1),
                "kl_coef": 0.02,
                **own["ppo"],
            },
            "train": {
                "steps": scale.steps,
                "eval_every": max(scale.steps // 6, 1),
                "eval_prompts": scale.eval_prompts,
                "show_examples": 3 if method == "TPPO" else 0,
            },
        }
    )


class Evaluation:
    """The same held-out prompts, ``RESPONSES`` sampled responses each, for any number of policies."""

    def __init__(self, config: Config, start: Path, train: Sequence[Session], held_out: Sequence[Session]) -> None:
        self.config = config
        self.tokenizer = loading.load_tokenizer(str(start))
        self._builder = PromptBuilder(self.tokenizer, config.data)
        self._sessions = held_out
        self._prompts = self._builder.prompts(held_out)
        self._reward = build_reward(
            config.reward,
            self.tokenizer,
            expected_length=self._builder.expected_length(train),
            separator=config.data.separator,
            num_queries=config.data.num_queries,
        )
        self.users = [p.user_id for p in self._prompts for _ in range(RESPONSES)]
        self.examples: list[report.Example] = []
        self.figures: dict[str, Figure] = {}

    def scores(self, folders: Mapping[str, Path], more: More | None = None) -> dict[str, evaluate.Scores]:
        """Policy -> per-response scores; keeps two labelled responses and a histogram of rewards of each policy.

        ``more`` scores the same responses by something else.
        """
        out = {}
        for name, folder in folders.items():
            rollouts, _ = panel.respond(self.config, folder, self._sessions, RESPONSES)
            out[name] = evaluate.score(rollouts, self._builder.parse, num_queries=self.config.data.num_queries)
            out[name] |= more(rollouts) if more else {}
            self._explain(name, rollouts[:HISTOGRAM])
        return out

    def baselines(self, synthetic: bool) -> dict[str, evaluate.Scores]:
        """Rows without a model: copying, and for generated sessions what the topic and the exact posterior can reach."""
        count = self.config.data.num_queries
        rows = {"copy the last query": evaluate.copy_last(self._prompts, num_queries=count)}
        for name in ("right topic, most popular facets", "exact Bayes, whole history") if synthetic else ():
            answers = map(PREDICTORS[name], self._sessions)
            scored = [
                evaluate.score_queries(prompt, queries, num_queries=count)
                for prompt, queries in zip(self._prompts, answers, strict=True)
            ]
            rows[name] = {metric: np.array([row[metric] for row in scored]) for metric in scored[0]}
        return {name: {k: np.repeat(v, RESPONSES) for k, v in row.items()} for name, row in rows.items()}

    def _explain(self, name: str, rollouts: Sequence[Rollout]) -> None:
        """Keep the rewards of these responses as a histogram, and two of them as examples."""
        rewards, classes = self._reward.explain(rollouts)
        by_class: dict[str, list[float]] = {kind: [] for kind in CLASS_NAMES}
        for index, (rollout, values, kinds) in enumerate(zip(rollouts, rewards, classes or [], strict=True)):
            for kind, value in zip(kinds, values.tolist(), strict=True):
                by_class[CLASS_NAMES[kind]].append(value)
            if index in (0, RESPONSES):  # the first response to the first two prompts
                text, spans = token_spans(self.tokenizer, rollout.token_ids)
                past, true = " | ".join(rollout.prompt.history), " | ".join(rollout.prompt.next_queries)
                tokens = [(text[a:b], k, float(v)) for (a, b), k, v in zip(spans, kinds, values.tolist(), strict=True)]
                caption = f"{name}. History: {past}. True next: {true}"
                self.examples.append(report.Example(caption=caption, tokens=tokens))
        caption = f"Rewards of the tokens of {len(rollouts)} held-out responses: {name}"
        self.figures[caption] = reward_histogram(by_class, name)


def _verdicts(scores: dict[str, evaluate.Scores], users: list[str]) -> list[str]:
    pairs = [("TPPO", "start"), ("last-token PPO", "start"), ("TPPO", "last-token PPO")]
    gaps = [evaluate.paired_difference(scores[a]["relevance"], scores[b]["relevance"], users) for a, b in pairs]
    return [
        report.verdict(a, b, gap.mean, gap.low, gap.high, "eval/relevance", p=gap.p)
        for (a, b), gap in zip(pairs, holm(gaps), strict=True)
    ]


def _print_table(table: dict[str, dict[str, Estimate]], verdicts: list[str]) -> None:
    shown = Table(title="Held-out sessions: mean [95 % interval over users]")
    for column in ("policy", *TABLE):
        shown.add_column(column)
    for name, row in table.items():
        cells = [cell(row.get(metric), metric == "relevance") for metric in TABLE]
        shown.add_row(name, *cells)
    console = table_console()
    console.print(shown)
    for sentence in verdicts:
        console.print(sentence)


def _write_report(
    path: Path,
    options: DemoSettings,
    configs: dict[str, Config],
    table: dict[str, dict[str, Estimate]],
    verdicts: list[str],
    evaluation: Evaluation,
) -> None:
    per_step = configs["TPPO"].rollout.prompts_per_step * configs["TPPO"].rollout.samples_per_prompt
    runs = [report.Run(name=n, rows=read_metrics(c.run_dir), samples_per_step=per_step) for n, c in configs.items()]
    rows = {name: {f"eval/{m}": e for m, e in row.items() if m in TABLE} for name, row in table.items()}
    given = {k: v for k, v in asdict(options).items() if k != "fresh" and v != getattr(DemoSettings(), k)}
    flags = "".join(f" --{k.replace('_', '-')} {v}" for k, v in given.items())
    report.write_report(
        path,
        report.Report(
            title="TPPO against PPO on the same rewards, summed onto the last token",
            verdict=" ".join(verdicts),
            command=f"tppo-fast demo{flags}",
            settings=configs["TPPO"].model_dump(mode="json"),
            runs=runs,
            table=rows,
            examples=evaluation.examples,
            figures=evaluation.figures,
        ),
    )
