"""Hashes of what a run or a labelling is made of: one for a file, one for a model folder, one for a user."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PARTS = {".jinja", ".json", ".model", ".py", ".safetensors", ".txt"}
"""Files of a model folder that decide what it computes: config and tokenizer, its own code, weights."""


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes, or of the names and bytes of a model folder's files, which are read at the same time."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in PARTS and file.is_file())
        with ThreadPoolExecutor() as pool:
            lines = [f"{f.name} {digest}\n" for f, digest in zip(files, pool.map(sha256_of, files), strict=True)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def user_hash(user_id: str) -> str:
    """Hex digits by which a user is found again in a list of users. Ids that can be guessed can be looked up, too."""
    return hashlib.sha256(user_id.encode()).hexdigest()[:16]
