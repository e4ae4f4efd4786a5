"""AI feedback: who judges the words of sampled responses, how the judgements are made, kept, read and compared."""

from __future__ import annotations

from tppo_fast.labelling.records import LabelledResponse, read_labels, write_labels

__all__ = ["LabelledResponse", "read_labels", "write_labels"]
