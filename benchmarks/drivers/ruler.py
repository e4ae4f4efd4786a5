"""What is the same for every trainer: how work is asked for and answered, how phases are timed, how memory is read.

Drivers run with this folder as their import path, in environments that have torch and the peer but not tppo_fast.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

PHASES = ("rollout", "prepare", "update")


def read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(the request, its tensors); also sets the threads it asks for, before torch does any work."""
    request = json.loads((folder / "request.json").read_text())
    torch.set_num_threads(request["threads"])
    inputs = folder / "inputs.safetensors"
    return request, load_file(inputs) if inputs.exists() else {}


def write(folder: Path, answer: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Leave tensors, then the answer: where there is an answer, it is whole."""
    if tensors:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, folder / "outputs.safetensors")
    part = folder / "answer.part"
    part.write_text(json.dumps(answer))
    part.replace(folder / "answer.json")


def hide_vllm_from_trl() -> None:
    """TRL 1.12 imports names that vLLM 0.32 no longer has, wherever vLLM is installed; what is compared needs no vLLM."""
    from trl import import_utils

    import_utils.is_vllm_available = lambda *_, **__: False


def even_share(responses: torch.Tensor) -> torch.Tensor:
    """The reward of every trainer: the share of even ids in each response, [B, R] -> [B]. It costs nothing."""
    return (responses % 2 == 0).float().mean(1)


@torch.no_grad()
def final_logprobs(lm: Any, sequences: torch.Tensor, request: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """{"logprobs": what the trained policy gives each response in the end, [B]}, where the request asks for it."""
    if not request.get("learned"):
        return {}
    found, width = [], request["new_tokens"]
    for rows in sequences.to(lm.device).split(8):
        logits = lm(input_ids=rows, logits_to_keep=width + 1).logits[:, :-1].float()
        found.append(-cross_entropy(logits.transpose(1, 2), rows[:, -width:], reduction="none").sum(1))
    return {"logprobs": torch.cat(found).cpu()}


def peak_gib() -> float:
    """Peak memory since the last call in GiB: of the GPU's allocator, or what of the process was resident.

    Linux starts the process's peak anew at each call; elsewhere it is that of the whole process so far.
    """
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 2**30
    status = Path("/proc/self/status")
    if not status.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**30 if sys.platform == "darwin" else 2**20)
    peak = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return peak / 2**20


class Stopwatch:
    """Seconds and peak memory of each phase, iteration by iteration, the device's queue emptied at every mark."""

    def __init__(self) -> None:
        self.iterations: list[dict[str, float]] = []
        self._row: dict[str, float] = {}
        self._last = 0.0

    def begin(self) -> None:
        """An iteration begins."""
        torch.set_float32_matmul_precision("high")  # what is fp32 on a GPU is TF32, for everybody
        self._row = {}
        self._synchronise()
        peak_gib()
        self._last = time.perf_counter()

    def mark(self, phase: str) -> None:
        """The phase ends here, unless it has ended before in this iteration."""
        if f"{phase}_seconds" in self._row:
            return
        self._synchronise()
        now = time.perf_counter()
        self._row |= {f"{phase}_seconds": now - self._last, f"{phase}_peak_gib": peak_gib()}
        self._last = time.perf_counter()

    def end(self) -> None:
        """The iteration ends, and with it the update."""
        self.mark("update")
        self._row["whole_seconds"] = sum(self._row.get(f"{phase}_seconds", 0.0) for phase in PHASES)
        self._row["whole_peak_gib"] = max(self._row.get(f"{phase}_peak_gib", 0.0) for phase in PHASES)
        self.iterations.append(self._row)

    @staticmethod
    def _synchronise() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
