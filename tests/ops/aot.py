"""Compile every Triton kernel in its shipped configurations for a GPU that is not here, and read the machine code.

    python tests/ops/aot.py sm_90 [table.json]

The public ops are called on CPU tensors under a pretended driver: each launch is bound, specialised and compiled
exactly as on the device, and not run. One target per process. Prints a table; with a path also writes it as JSON.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel

SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}


class PretendedDriver:
    """Answers what the compiler asks about a device."""

    def __init__(self, name: str):
        amd = name.startswith("gfx")
        self.target = GPUTarget("hip", name, 64) if amd else GPUTarget("cuda", int(name[3:]), 32)
        shared = SHARED_LIMIT[name]

        class Utils:
            @staticmethod
            def get_device_properties(_device):
                return {"max_shared_mem": shared, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

        self.utils = Utils()

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 0

    def set_current_device(self, _device):
        pass

    def get_active_torch_device(self):
        return torch.device("cpu")


def record_compilations(name: str) -> list[CompiledKernel]:
    """From now on launches compile for ``name`` and do not run; the list receives every compiled kernel."""
    import triton.compiler as compiler

    compiled: list[CompiledKernel] = []
    compile_ = compiler.compile

    def recording(*args: Any, **options: Any) -> Any:
        compiled.append(compile_(*args, **options))
        return compiled[-1]

    compiler.compile = recording  # the launcher imports it from here
    CompiledKernel.run = property(lambda _: lambda *_args, **_options: None)  # type: ignore[assignment,misc]
    CompiledKernel.launch_metadata = lambda *_: None  # type: ignore[assignment]
    triton.runtime.driver.set_active(PretendedDriver(name))
    from tppo_kernels.triton_ops import live_rows

    live_rows.is_hopper = lambda _: name in ("sm_90", "sm_100")
    return compiled


def launch_everything() -> None:
    """Each op with every combination of arguments that changes its code."""
    from tppo_kernels import triton_ops
    from tppo_kernels.testing import random_head, random_logits, random_ppo, random_rollouts

    for dtype, softcap in [
        (torch.bfloat16, None),
        (torch.bfloat16, 30.0),
        (torch.float16, 30.0),
        (torch.float32, None),
    ]:
        logits, targets = random_logits(4, 8192, dtype)
        logp, entropy = triton_ops.logprobs_from_logits(logits.requires_grad_(), targets, softcap=softcap)
        torch.autograd.backward([logp, entropy], [torch.ones(4), torch.ones(4)], retain_graph=True)
        logp.sum().backward()
    odd, targets = random_logits(3, 50_257, torch.bfloat16)
    triton_ops.logprobs_from_logits(odd, targets)
    for dtype, logits_dtype in [
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.float16, None),
        (torch.float32, None),
    ]:
        hidden, weight, targets = (t.requires_grad_(t.is_floating_point()) for t in random_head(8, 16, 512, dtype))
        for compact in (False, True):  # of two chunks: the second one adds to dW
            triton_ops.linear_token_loss(
                hidden, weight, targets, lambda logp, entropy: ((logp - entropy).sum(), {}), chunk_size=4,
                logits_dtype=logits_dtype, compact_rows=compact,
            )  # fmt: skip
    hidden, weight, targets = (
        t.requires_grad_(t.is_floating_point()) for t in random_head(8, 16, 1001, torch.bfloat16)
    )
    triton_ops.linear_token_loss(hidden, weight, targets, lambda logp, entropy: ((logp - entropy).sum(), {}))
    x = random_rollouts([1024, 1024])
    for options in ((), ("bootstrap", "lam"), ("mask", "bootstrap")):
        triton_ops.gae(x["rewards"], x["values"], x["cu_seqlens"], return_stats=True, **{k: x[k] for k in options})
    triton_ops.gae(x["rewards"], x["values"], x["cu_seqlens"])
    triton_ops.whitening_stats(x["rewards"])
    triton_ops.whitening_stats(x["rewards"], mask=x["mask"])
    y = random_ppo(2048)
    triton_ops.ppo_loss(y["logp"], y["old_logp"], y["advantages"])
    for kind in ("k1", "k2", "k3"):
        triton_ops.ppo_loss(**y, kl_coef=0.1, kl_estimator=kind, entropy_coef=0.01, normalizer=torch.tensor(9.0))
    triton_ops.ppo_loss(**y, kl_coef=0.1, entropy_coef=0.01, value_clip=None, normalizer=9.0)
    triton_ops.ppo_loss(**y, kl_coef=0.1, entropy_coef=0.01, mask=y["weights"] < 1.0)


def _nvidia(kernel: CompiledKernel, name: str) -> dict[str, Any]:
    """Registers and stack as the machine code declares them, and its opcodes: a spill is a local store or load."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name)
        code = _output(knobs.nvidia.nvdisasm.path, "-c", "-ndf", cubin.name)
    opcodes = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code, re.M)
    return {
        "registers": max(map(int, re.findall(r"REG:(\d+)", usage))),
        "stack": max(map(int, re.findall(r"STACK:(\d+)", usage))),
        "spills": sum(op in ("STL", "LDL") for op in opcodes),
        "tensor_core": sum(op == TENSOR_CORE[name] for op in opcodes),
        "instructions": len(opcodes),
    }


def _dot_operands(kernel: CompiledKernel) -> str | None:
    """bf16, f16 or f32; None without a dot."""
    found = re.search(r"tt\.dot .*: tensor<\w+x(\w+)>", kernel.asm["ttir"])
    return found.group(1) if found else None


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _amd(kernel: CompiledKernel) -> dict[str, Any]:
    code = kernel.asm["amdgcn"]

    def number(key: str) -> int:
        return max(map(int, re.findall(rf"\.{key}:\s+(\d+)", code)), default=0)

    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "tensor_core": len(re.findall(r"v_mfma", code)),
        "instructions": len(re.findall(r"^\s+[vs]_", code, re.M)),
    }


def table(name: str) -> list[dict[str, Any]]:
    """One row per compiled kernel."""
    compiled = record_compilations(name)
    launch_everything()
    rows = []
    for kernel in compiled:
        read = _amd(kernel) if name.startswith("gfx") else _nvidia(kernel, name)
        rows.append({
            "kernel": kernel.metadata.name, "warps": kernel.metadata.num_warps, "shared": kernel.metadata.shared,
            "shared_limit": SHARED_LIMIT[name], "dot": _dot_operands(kernel), **read,
        })  # fmt: skip
    return rows


def main() -> None:
    name, *paths = sys.argv[1:]
    rows = table(name)
    report = {"target": name, "triton": triton.__version__, "kernels": rows}
    print(f"{name}, triton {triton.__version__}")
    for row in rows:
        print("  {kernel:24s} warps {warps}  registers {registers:3d}  spills {spills}  shared {shared:6d}"
              "  dot {dot!s:4s} tensor-core {tensor_core:2d}  instructions {instructions}".format(**row))  # fmt: skip
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
