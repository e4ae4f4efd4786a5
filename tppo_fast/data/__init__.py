"""Search sessions: on disk, as prompts, and from the embedded generator."""

from __future__ import annotations

from tppo_fast.data.prompts import PromptBuilder
from tppo_fast.data.relevance import relevance
from tppo_fast.data.sessions import Session, read_sessions, split_by_user, write_sessions
from tppo_fast.data.synthetic import generate_sessions

__all__ = [
    "PromptBuilder",
    "Session",
    "generate_sessions",
    "read_sessions",
    "relevance",
    "split_by_user",
    "write_sessions",
]
