"""Responses of a policy to label, sampled once and kept, so that a resumed run labels the same ones."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tppo_fast.data.rows import Session, show
from tppo_fast.errors import UserError
from tppo_fast.generation import BATCH, Sampler, SampleSettings
from tppo_fast.hashing import sha256_of
from tppo_fast.labelling.journal import Journal, fill, journal_path
from tppo_fast.labelling.records import Response, read_record, read_responses, write_record, write_responses
from tppo_fast.sections import first_change


def sampled_responses(
    settings: SampleSettings, sessions: Sequence[Session], sessions_file: Path, out: Path, *, fresh: bool
) -> list[Response]:
    """The responses in ``out``, sampled now where that file does not hold them yet.

    Raises:
        UserError: ``out`` holds responses that were sampled with other settings, or the policy cannot be loaded.
    """
    wanted = {
        "sessions_sha256": sha256_of(sessions_file),
        "policy_sha256": policy_sha256(settings.policy),
        **{name: value for name, value in asdict(settings).items() if name != "policy"},
    }
    if fresh:
        out.unlink(missing_ok=True)
        journal_path(out).unlink(missing_ok=True)
    if out.exists():
        if changed := first_change(read_record(out) or {}, wanted):
            raise UserError(
                f"{show(str(out))} was sampled with another {changed[0]}: use --fresh to sample again, or another --out"
            )
        return read_responses(out, sessions)
    keys = [f"{number}/{hashlib.sha256(repr(wanted).encode()).hexdigest()[:16]}" for number in range(len(sessions))]
    with Journal(journal_path(out)) as journal:
        if not all(key in journal.entries for key in keys):
            with contextlib.closing(Sampler(settings, sessions)) as sampler:
                fill(journal, keys, sampler, chunk=BATCH, concurrency=0, verb="sample", unit="session")
        texts = [journal.entries[key]["responses"] for key in keys]
    responses = [
        Response(session=number, user_id=session.user_id, text=text)
        for number, (session, answers) in enumerate(zip(sessions, texts, strict=True), 1)
        for text in answers
    ]
    write_record(out, wanted)
    write_responses(out, responses)
    journal_path(out).unlink()
    return responses


def policy_sha256(folder: Path) -> str:
    """One hash over the weights, config and tokenizer of a model folder.

    Raises:
        UserError: it is no model folder.
    """
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise UserError(
            f"--responses {show(str(folder))}: give a .jsonl or .parquet file, or a folder with a causal LM (safetensors)"
        )
    return sha256_of(folder)
