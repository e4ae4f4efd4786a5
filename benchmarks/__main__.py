"""Every benchmark: ``python -m benchmarks --suite ops,rollout,step,learning``. How a result is made: benchmarks/README.md.

Each suite runs in a process of its own and leaves ``benchmarks/results/<device>/<suite>.json``; from those the plots and the
tables of the READMEs are made again. Exits with 1 when a suite fails, or with ``--check`` when tppo_fast fell behind its kept
ratios.
"""

from __future__ import annotations

import importlib
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import click

from benchmarks import providers, results
from benchmarks.providers import Suite
from benchmarks.results import Options
from tppo_fast.errors import UserError

DEFAULTS = Options()


def _suites(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    if unknown := [name for name in names if name not in providers.SUITES]:
        raise click.BadParameter(f"{unknown[0]!r}: there are {', '.join(providers.SUITES)}")
    return names


def _names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(name.strip() for name in value.split(",") if name.strip())


@click.command(help=__doc__)
@click.option("--suite", "suites", default=",".join(providers.SUITES), callback=_suites, help="Which, by commas.")
@click.option(
    "--providers",
    "names",
    default=None,
    callback=_names,
    help="Which of benchmarks/providers.py, by commas; kept apart from the results.",
)
@click.option("--threads", type=click.IntRange(1), default=min(2, os.cpu_count() or 1), help="CPU threads of each.")
@click.option("--rounds", type=click.IntRange(1), default=None, help="Turns of every provider.")
@click.option("--seed", type=int, default=0, help="Of inputs, models and sampling.")
@click.option("--model", type=click.Path(path_type=Path), default=DEFAULTS.model, help="For rollout and step.")
@click.option("--prompts", type=click.IntRange(1), help="Of a step; sizes given so are kept apart from the results.")
@click.option("--prompt-tokens", type=click.IntRange(1), help="Tokens of each prompt of a step.")
@click.option("--samples", type=click.IntRange(1), help="Responses to each prompt of a step.")
@click.option("--new-tokens", type=click.IntRange(1), help="Tokens of each response of a step.")
@click.option("--microbatch", type=click.IntRange(1), help="Responses in one pass of a step.")
@click.option("--scratch", type=click.Path(path_type=Path), default=DEFAULTS.scratch, help="Runs and peers' files.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Where <device>/<suite>.json go.")
@click.option("--quick", is_flag=True, help="Tiny sizes, kept apart from the results: that everything runs.")
@click.option("--check", is_flag=True, help="Measure again and compare ratios with the kept results, which stay.")
def main(
    suites: tuple[Suite, ...], names: tuple[str, ...] | None, threads: int, rounds: int | None, seed: int, model: Path,
    scratch: Path, out: Path | None, quick: bool, check: bool, **sizes: int | None,
) -> None:  # fmt: skip
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    shape = {name: size for name, size in sizes.items() if size is not None}
    aside = "quick" if quick else "check" if check else "some" if names or shape else None
    folder = out or (scratch / aside if aside else results.ROOT)
    options = Options(
        providers=names, threads=threads, quick=quick, rounds=rounds, seed=seed, model=model, shape=shape,
        scratch=scratch,
    )  # fmt: skip
    try:
        if check and (quick or names or shape):
            raise UserError("--check measures again what was kept: leave out --quick, --providers and sizes")
        if shape and suites != ("step",):
            raise UserError(f"--{next(iter(shape)).replace('_', '-')} is a size of the step suite: add --suite step")
        for suite in suites:
            if not providers.chosen(suite, names):
                raise UserError(
                    f"--providers {','.join(names or ())!r}: none of them takes part in {suite}; leave that suite out"
                )
        if {"rollout", "step"} & set(suites) and not (model / "config.json").exists():
            raise UserError(
                f"--model {str(model)!r} holds no model: `make smollm2` writes SmolLM2-135M to .cache/smollm2"
            )
        fallen = run(suites[0], options, folder, check) if len(suites) == 1 else []
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    if len(suites) == 1:
        sys.exit("\n".join(["fell behind the kept results:", *fallen]) if fallen else 0)
    from benchmarks import machine

    os.environ.setdefault(machine.COMMIT, machine.commit())  # before the first suite's results change the checkout
    failed = [suite for suite in suites if _spawn(suite)]
    if folder == results.ROOT:
        subprocess.run([sys.executable, "-m", "benchmarks.tables"], check=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def _spawn(suite: Suite) -> int:
    """This very command for one suite, in a process of its own: what it leaves in memory disturbs no other."""
    given = sys.argv[1:]
    while "--suite" in given:
        del given[(at := given.index("--suite")) : at + 2]
    given = [argument for argument in given if not argument.startswith("--suite=")]
    return subprocess.run([sys.executable, "-m", "benchmarks", *given, "--suite", suite], check=False).returncode


def run(suite: Suite, options: Options, folder: Path, check: bool) -> list[str]:
    """Run one suite in this process and keep its results; returns what fell behind, if asked to check."""
    from benchmarks import machine

    began = time.monotonic()
    outcome = importlib.import_module(f"benchmarks.bench_{suite}").run(options)
    command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    record = {
        "machine": machine.record(),
        "providers": providers.record(providers.chosen(suite, options.providers)),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    report = results.report(suite, command, options, outcome, record)
    path = folder / machine.folder() / f"{suite}.json"
    results.write(report, path)
    from benchmarks import tables

    click.echo(tables.full(report))
    click.echo(f"{suite}: {record['minutes']} minutes, kept in {path}")
    kept = results.load(results.ROOT / machine.folder() / f"{suite}.json") if check else None
    return results.regressions(results.rows_of(report), results.rows_of(kept)) if kept else []


if __name__ == "__main__":
    main()
