"""Does a policy get better by a reward model's rewards, in the eyes of a judge that did not label? From sessions to verdict.

    python -m benchmarks.learning_from_feedback --out runs/feedback                     # the demo's model, full length
    python -m benchmarks.learning_from_feedback --out runs/real --model .cache/smollm2 --data SESSIONS.jsonl ...
    python -m benchmarks.learning_from_feedback --out runs/planted --backbone encoder --seeds 0     # the reward model alone

Supervise a policy, sample its responses to the training users' sessions, spoil a copy of each, label all by words, train a
reward model, train the policy by TPPO on its rewards with several seeds from the same start, and score start and result on the
held-out users. ``--labels planted`` labels against every relevant query of the generated world; ``next`` against what the users
asked next, which is noisy. ``--labeller`` says who compares the words: the lexical labeller, or the embedding judge. Policies are
judged by the truth or by the judge that did not label (``_independent``); ``--judge ENCODER`` is that embedding judge. Planted
labels have a ceiling, which is printed beside the reward model (``reward_model.exact_judge``). Every stage is kept in --out and
taken up again: run the same command to continue.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from tppo_fast import checkpoint, demo, evaluate, loading, report, trainer
from tppo_fast import config as settings
from tppo_fast.atomic import write_atomic
from tppo_fast.config import Config
from tppo_fast.data.perturb import perturb
from tppo_fast.data.prompts import PromptBuilder
from tppo_fast.data.relevance import relevance
from tppo_fast.data.rows import searched
from tppo_fast.data.sessions import Session
from tppo_fast.data_types import Rollout
from tppo_fast.labelling.embedding import EmbeddingJudge, EmbeddingSettings, SentenceEncoder
from tppo_fast.labelling.judges import Item
from tppo_fast.labelling.records import LabelledResponse, read_labels, write_labels
from tppo_fast.metrics import read_metrics
from tppo_fast.reward_model import quality
from tppo_fast.reward_model.data import Example, encode, split
from tppo_fast.reward_model.exact_judge import as_probabilities, judges
from tppo_fast.reward_model.run import score, train_reward_model
from tppo_fast.reward_model.settings import RewardModelConfig
from tppo_fast.rewards.labels import RELEVANT, SEPARATOR, Labels
from tppo_fast.rewards.lexical import LexicalLabeller
from tppo_fast.rewards.token_model import load
from tppo_fast.rollout import SamplingParams, build_engine
from tppo_fast.sections import build_section, first_change
from tppo_fast.words import queries_of

LEXICAL = {"planted": ("hit", "mrr", "exact", "word_relevance"), "next": ("relevance",)}
"""Labels -> the held-out metrics whose truth the lexical labeller never saw. ``relevance`` reads the relevant queries of the
generated world, the others what the users asked next; a sessions file knows nothing wider, so there the two are the same."""
EMBEDDING = ("relevance", "hit", "mrr", "word_relevance")
"""The held-out metrics that compare words and queries letter by letter, which the embedding judge does not."""

METRICS = ("relevance", "hit", "mrr", "exact", "word_relevance", "copy", "distinct", "valid", "length")
JUDGED = ("embedding_words", "embedding_sentence")
"""Share of a response's words that the embedding judge calls relevant, and its verdict on the whole."""


def main() -> None:
    """Run or continue every stage."""
    options = _arguments()
    torch.set_num_threads(1)
    out: Path = options.out
    base = demo.DemoSettings(
        run_dir=out,
        model=options.model,
        data=options.data,
        sft_steps=options.sft_steps,
        steps=options.steps,
        lr=options.lr,
        rollout=options.rollout,
    )
    demo.open_folder(base)
    _same_options(options)
    sessions, held_out = demo.sessions(base)
    start = demo.supervised(base, sessions)
    labels = _labels(options, demo.run_config(base, start, "TPPO"), sessions)
    reward_model = _reward_model(options, labels, start)
    result = {
        "command": {k: str(v) for k, v in vars(options).items()},
        "machine": report.machine_record(),
        "reward_model": _model_figures(reward_model, sessions, labels, options.labels),
    }
    if options.seeds:
        result |= _policies(options, base, start, reward_model, sessions, held_out, result)
    write_atomic(out / "result.json", json.dumps(result, indent=2).encode())
    print(json.dumps(result, indent=2))


def _policies(
    options: argparse.Namespace,
    base: demo.DemoSettings,
    start: Path,
    reward_model: Path,
    sessions: Sequence[Session],
    held_out: Sequence[Session],
    so_far: Mapping[str, Any],
) -> dict[str, Any]:
    """Train a policy per seed, compare all with their start, write the report."""
    runs = [_trained(options, base, start, reward_model, seed) for seed in range(options.seeds)]
    config = _paid_by(options, demo.run_config(base, start, "TPPO"), reward_model, seed=0)
    evaluation = demo.Evaluation(config, start, sessions, held_out[: options.eval_sessions])
    names = [f"seed {seed}" for seed in range(len(runs))]
    more = _second_opinion(options.judge, config.data.num_queries) if options.judge else None
    scores = evaluation.scores({"start": start, **dict(zip(names, runs, strict=True))}, more)
    found = {"differences": _differences(scores, names, evaluation.users), "independent": _independent(options)}
    _write_report(options, config, evaluation, {**so_far, **found}, runs)
    return found


def _same_options(options: argparse.Namespace) -> None:
    """Refuse to go on with stages that were made with other options; more seeds and other held-out sessions are none."""
    path = options.out / "options.json"
    wanted = {k: str(v) for k, v in vars(options).items() if k not in ("out", "seeds", "eval_sessions")}
    if path.exists() and (changed := first_change(json.loads(path.read_text()), wanted)):
        name, was, is_now = changed
        raise SystemExit(
            f"--{name.replace('_', '-')} = {is_now}, but {options.out} was begun with {was}: give another --out"
        )
    write_atomic(path, json.dumps(wanted, indent=2).encode())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="", help="a causal LM; empty: the demo's small one")
    parser.add_argument("--data", default="synthetic")
    parser.add_argument("--rollout", default="hf", help="who samples: hf or vllm")
    parser.add_argument("--labels", choices=LEXICAL, default="planted")
    parser.add_argument("--labeller", choices=("lexical", "embedding"), default="lexical", help="embedding: by --judge")
    parser.add_argument("--backbone", default="policy", help="policy; encoder or decoder: a small new one; or a folder")
    parser.add_argument("--seeds", type=int, default=3, help="0: stop at the reward model")
    parser.add_argument("--sft-steps", type=int)
    parser.add_argument("--steps", type=int, help="PPO steps")
    parser.add_argument("--lr", type=float, help="of PPO")
    parser.add_argument("--prompts-per-step", type=int)
    parser.add_argument("--samples-per-prompt", type=int)
    parser.add_argument("--sessions", type=int, default=10_000, help="training sessions to label, drawn at random")
    parser.add_argument("--samples", type=int, default=2, help="responses sampled to each of them")
    parser.add_argument("--copies", action="store_true", help="label the end of each history as a response, too")
    parser.add_argument("--judge", default="", help="a sentence encoder's folder: judge the policies by it as well")
    parser.add_argument("--eval-sessions", type=int, default=10_000)
    parser.add_argument("--rm-lr", type=float, default=1e-3)
    parser.add_argument("--rm-epochs", type=int, default=1)
    parser.add_argument("--rm-test", type=float, default=0.1, help="share of the labelled users who only measure it")
    parser.add_argument("--value", default="soft")
    parser.add_argument("--scale", default="centred")
    parser.add_argument("--reject-copies", action="store_true", help="reward.reject_copies")
    parser.add_argument(
        "--kl-coef", type=float, default=0.2, help="a learned reward needs a leash: TPPO's 0.2, not the demo's"
    )
    options = parser.parse_args()
    if options.labeller == "embedding" and not options.judge:
        parser.error("--labeller embedding: give its sentence encoder's folder as --judge")
    if options.labels == "planted" and (options.data != "synthetic" or options.labeller == "embedding"):
        parser.error("--labels planted: only of generated sessions (--data synthetic), by the lexical labeller")
    if options.labels == "next" and options.labeller == "lexical" and options.data != "synthetic" and not options.judge:
        parser.error("--labels next of a file: nobody is left who did not label; give --judge")
    return options


def _labels(options: argparse.Namespace, config: Config, sessions: Sequence[Session]) -> Path:
    """Sampled responses, a spoiled copy of each and with --copies the end of its history, labelled word by word."""
    path = options.out / "labels.jsonl"
    if path.exists():
        return path
    rng = random.Random(0)
    pool = [query for session in sessions for query in session.next_queries]
    items, owners = [], []
    for session, text in _sampled(options, config, _drawn(sessions, options.sessions)):
        queries = queries_of(text, config.data.separator)
        spoiled = perturb(queries, searched(session.history), pool, rng) if queries else []
        copied = searched(session.history)[-rng.randint(1, 3) :] if options.copies else []
        truth = session.relevant_queries if options.labels == "planted" else session.next_queries
        for response in (text, *(" " + config.data.separator.join(wrong) for wrong in (spoiled, copied))):
            items.append(Item(history=tuple(searched(session.history)), next_queries=tuple(truth), response=response))
            owners.append(session)
    judged = zip(owners, items, _judged(options, config.data.num_queries, items), strict=True)
    write_labels(path, [_row(*one, options) for one in judged if one[-1].spans])
    return path


def _judged(options: argparse.Namespace, num_queries: int, items: Sequence[Item]) -> list[Labels]:
    """The labels of each item, causal ones (see ``tppo_fast.labelling.embedding`` for "prefix")."""
    if options.labeller == "embedding":
        own = EmbeddingSettings(mode="prefix", num_queries=num_queries)
        return EmbeddingJudge(SentenceEncoder(options.judge), own).label(items)
    labeller = LexicalLabeller(num_queries=num_queries)
    return [labeller(item.history, item.next_queries, item.response) for item in items]


def _drawn(sessions: Sequence[Session], count: int) -> Sequence[Session]:
    """``count`` of them at random, which means many users even where each has many; all, in order, where there are no more."""
    return sessions if count >= len(sessions) else random.Random(0).sample(sessions, count)


def _row(session: Session, item: Item, labels: Labels, options: argparse.Namespace) -> LabelledResponse:
    return LabelledResponse(
        user_id=session.user_id,
        history=session.history,
        next_queries=session.next_queries,
        response=item.response,
        labels=labels,
        labeller=f"{options.labeller}-{options.labels}",
    )


def _sampled(options: argparse.Namespace, config: Config, sessions: Sequence[Session]) -> list[tuple[Session, str]]:
    """(session, response) of the supervised policy; kept in ``responses.json``."""
    path = options.out / "responses.json"
    if not path.exists():
        tokenizer = loading.load_tokenizer(config.model.path)
        prompts = PromptBuilder(tokenizer, config.data).prompts(sessions)
        sampling = SamplingParams(
            n=options.samples, max_new_tokens=config.rollout.max_new_tokens, temperature=1.0, top_p=1.0, top_k=0, seed=1
        )
        with contextlib.closing(build_engine(config, tokenizer, torch.device("cpu"))) as engine:
            engine.load_weights(loading.load_causal_lm(config.model.path).state_dict().items(), version=0)
            texts = [rollout.text for rollout in engine.generate(prompts, sampling)]
        write_atomic(path, json.dumps(texts).encode())
    repeated = itertools.chain.from_iterable(itertools.repeat(s, options.samples) for s in sessions)
    return list(zip(repeated, json.loads(path.read_text()), strict=True))


def _reward_model(options: argparse.Namespace, labels: Path, start: Path) -> Path:
    run_dir = options.out / "reward-model"
    if not (run_dir / "model").is_dir():
        values = {
            "run_dir": str(run_dir),
            "threads": 1,
            "backbone": _backbone(options.backbone, start),
            "data": {"labels": str(labels), "test_fraction": options.rm_test},
            "train": {"lr": options.rm_lr, "epochs": options.rm_epochs},
        }
        config = build_section(values, RewardModelConfig)
        train_reward_model(config, resume=bool(checkpoint.list_checkpoints(run_dir)))
    return run_dir / "model"


def _backbone(name: str, start: Path) -> dict[str, str]:
    if name in ("encoder", "decoder"):
        return {"path": "scratch", "scratch": name}
    return {"path": str(start) if name == "policy" else name}


def _trained(options: argparse.Namespace, base: demo.DemoSettings, start: Path, reward_model: Path, seed: int) -> Path:
    """The policy that TPPO makes of ``start`` with the reward model's rewards."""
    config = _paid_by(options, demo.run_config(base, start, "TPPO"), reward_model, seed)
    if not (config.run_dir / "policy").is_dir():
        trainer.train(config, resume=bool(checkpoint.list_checkpoints(config.run_dir)))
    return config.run_dir / "policy"


def _paid_by(options: argparse.Namespace, config: Config, reward_model: Path, seed: int) -> Config:
    """The demo's TPPO run, on the reward model's rewards."""
    reward = {
        "source": "model",
        "model": str(reward_model),
        "value": options.value,
        "scale": options.scale,
        "length_penalty": True,
        "reject_copies": options.reject_copies,
    }
    batch = {name: getattr(options, name) for name in ("prompts_per_step", "samples_per_prompt")}
    changed = {
        "run_dir": str(options.out / f"tppo-{seed}"),
        "seed": seed,
        "threads": 1,
        "rollout": config.rollout.model_dump(mode="json") | {k: v for k, v in batch.items() if v is not None},
        "reward": config.reward.model_dump(mode="json") | reward,
        "ppo": config.ppo.model_dump(mode="json") | {"kl_coef": options.kl_coef},
        "train": config.train.model_dump(mode="json") | {"show_examples": 0, "tensorboard": False},
    }
    return settings.build(config.model_dump(mode="json") | changed)


def _model_figures(folder: Path, sessions: Sequence[Session], labels: Path, kind: str) -> dict[str, Any]:
    """The test users' metrics; for planted labels also the judges that know the world, and everyone's rank correlations."""
    record = json.loads((folder / "record.json").read_text())
    figures: dict[str, Any] = {"verdict": record["verdict"], "metrics": record["metrics"]}
    if kind == "planted":
        config = build_section(record["config"], RewardModelConfig)
        parts = split(read_labels(labels), config.data, config.seed)
        frozen, _ = load(str(folder), "cpu")
        examples = encode(parts.test, frozen.reader)
        scored = score(frozen, examples, config.train.microbatch_tokens)
        slots = _filled_slots(examples, sessions)
        figures["rank_correlation"] = _correlations(scored, slots)
        for name, judge in judges(LexicalLabeller(num_queries=3), parts.train).items():
            known = replace(scored, probabilities=as_probabilities([judge(example) for example in examples]))
            auc = quality.measure(known)["auc"]
            figures[name] = {"auc": asdict(auc), "rank_correlation": _correlations(known, slots)}
    return figures


def _correlations(scored: quality.Scored, slots: Sequence[float]) -> dict[str, float]:
    """Spearman's rho of each response's mean soft value with the share of its words, and of its slots, that are relevant."""
    truth = replace(scored, probabilities=np.eye(3)[scored.labels]).sentence_scores()
    mean = scored.sentence_scores()
    rank: Any = stats.spearmanr  # scipy's own types promise too little
    return {name: float(rank(mean, other).statistic) for name, other in (("words", truth), ("slots", slots))}


def _filled_slots(examples: Sequence[Example], sessions: Sequence[Session]) -> list[float]:
    """The relevance of each response as the policies' tables measure it: the share of slots with a new relevant query."""
    known = {(s.user_id, tuple(searched(s.history))): s.relevant_queries for s in sessions}
    shares = []
    for row in (example.row for example in examples):
        history = searched(row.history)
        truth = known[row.user_id, tuple(history)]
        shares.append(relevance(queries_of(row.response, ","), relevant=truth, history=history, num_queries=3))
    return shares


def _write_report(
    options: argparse.Namespace,
    config: Config,
    evaluation: demo.Evaluation,
    result: Mapping[str, Any],
    runs: list[Path],
) -> None:
    """Curves of every seed, reward histograms, coloured examples and the verdict of the independent judges."""
    verdicts = [
        report.verdict("TPPO on the reward model", "the start", mean, low, high, f"eval/{metric}")
        for metric in result["independent"]
        for mean, low, high in [result["differences"][metric]["difference"][:3]]
    ]
    per_step = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    report.write_report(
        options.out / "report.html",
        report.Report(
            title="TPPO on a learned token reward",
            verdict=" ".join([*verdicts, "Judges that did not label.", result["reward_model"]["verdict"]]),
            command="python -m benchmarks.learning_from_feedback, with the arguments in result.json",
            settings=config.model_dump(mode="json"),
            runs=[report.Run(name="TPPO", rows=read_metrics(run.parent), samples_per_step=per_step) for run in runs],
            examples=evaluation.examples,
            figures=evaluation.figures,
        ),
    )


def _independent(options: argparse.Namespace) -> list[str]:
    """The held-out metrics of the judges that did not label."""
    if options.labeller == "embedding":
        return [*EMBEDDING]
    truth = LEXICAL[options.labels] if options.data == "synthetic" else ()
    return [*truth, *(JUDGED if options.judge else ())]


def _second_opinion(folder: str, num_queries: int) -> demo.More:
    """What the embedding judge says of each response."""
    judge = EmbeddingJudge(SentenceEncoder(folder), EmbeddingSettings(num_queries=num_queries))

    def score_all(rollouts: Sequence[Rollout]) -> evaluate.Scores:
        items = [
            Item(history=tuple(r.prompt.history), next_queries=tuple(r.prompt.next_queries), response=r.text)
            for r in rollouts
        ]
        labels = judge.label(items)
        words = [[c for c in one.classes if c != SEPARATOR] for one in labels]
        shares = [kinds.count(RELEVANT) / max(len(kinds), 1) for kinds in words]
        return dict(zip(JUDGED, (np.array(shares), np.array([float(one.sentence) for one in labels])), strict=True))

    return score_all


def _differences(scores: dict[str, evaluate.Scores], names: Sequence[str], users: Sequence[str]) -> dict[str, Any]:
    """Metric -> start, trained policies, and their paired difference over users and seeds, its 95 % interval, how many users."""
    table = {}
    for metric in (*METRICS, *(name for name in JUDGED if name in scores["start"])):
        after = np.stack([scores[name][metric] for name in names])  # [R, B]
        before = np.broadcast_to(scores["start"][metric], after.shape)
        gap = evaluate.paired_difference(after, before, users)
        table[metric] = {
            "start": float(before.mean()),
            "trained": [float(run.mean()) for run in after],
            "difference": [gap.mean, gap.low, gap.high],
            "users": gap.users,
        }
    return table


if __name__ == "__main__":
    main()
