"""The compiled CPU backend: ``csrc`` loaded with ctypes, made torch ops by ``custom_ops``.

A package without the compiled library works; ``missing()`` says what is lost. Its kernels' results do not depend on the
number of threads; those of torch's GEMMs in the head ops do.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_double, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from . import checks, custom_ops
from .custom_ops import LogitOptions, PpoInputs, PpoOptions, PpoResults, Rows
from .linear_loss import linear_logprobs_op, linear_token_loss_op
from .reference import IGNORED

ABI_VERSION = 3
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class _LogitOptions(ctypes.Structure):
    _fields_ = [("temperature", c_double), ("softcap", c_double), ("scale", c_double)]


class _Logits(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("rows", c_int64), ("vocab", c_int64), ("stride", c_int64), ("dtype", c_int32)]


class _PpoInputs(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in PpoInputs._fields]


class _PpoOptions(ctypes.Structure):
    _fields_ = [*((name, c_double) for name in PpoOptions._fields[:-1]), ("kl_estimator", c_int32)]


def _load() -> ctypes.CDLL | str:
    """The library, or one sentence that says why there is none."""
    found = sorted(Path(__file__).parent.glob("libtppo_native.*"))
    if not found:
        return "the native kernels are not built: run `make native`, or install with SKBUILD_WHEEL_CMAKE=true"
    try:
        lib = ctypes.CDLL(str(found[0]))
        version = lib.tppo_abi_version()
    except (OSError, AttributeError) as error:  # no library, or another one
        return f"the native kernels do not load ({error}): run `make native` again"
    if version != ABI_VERSION:
        return f"the native kernels have version {version}, not {ABI_VERSION}: build them again with `make native`"
    vector, logits, numbers = c_void_p, POINTER(_Logits), POINTER(_LogitOptions)
    lib.tppo_simd.restype = ctypes.c_char_p
    lib.tppo_row_forward.restype = c_int64
    lib.tppo_row_forward.argtypes = [logits, *[vector] * 4, numbers, c_int]
    lib.tppo_row_backward.argtypes = [logits, *[vector] * 6, logits, numbers, c_int]
    lib.tppo_gae.restype = c_int64
    lib.tppo_gae.argtypes = [c_int32, *[vector] * 6, c_double, c_double, c_int64, c_int64, vector, vector, c_int]
    lib.tppo_stats.argtypes = [c_int32, vector, vector, c_int64, vector, c_int]
    lib.tppo_ppo.argtypes = [
        c_int32, POINTER(_PpoInputs), c_int64, POINTER(_PpoOptions), c_double, *[vector] * 4, c_int
    ]  # fmt: skip
    return lib


_LIB = _load()


def missing(device_type: str = "cpu") -> str | None:
    """Why this backend cannot run on such a device, in one sentence, or None when it can."""
    if device_type != "cpu":
        return f"backend 'native' runs on the CPU and the tensors are on {device_type}"
    return _LIB if isinstance(_LIB, str) else None


def simd() -> str:
    """The instruction set in use: avx512, avx2 or baseline."""
    return _lib().tppo_simd().decode()


def select_simd(name: str) -> None:
    """Use another instruction set (tests and benchmarks).

    Raises:
        ValueError: this processor or build does not have it.
    """
    if not _lib().tppo_select_simd(name.encode()):
        raise ValueError(f"instruction set {name!r} is not available here")


def _lib() -> ctypes.CDLL:
    if isinstance(_LIB, str):
        raise ValueError(_LIB)
    return _LIB


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _described(x: Tensor) -> _Logits:
    return _Logits(x.data_ptr(), x.shape[0], x.shape[1], x.stride(0), DTYPES[x.dtype])


def _rows_forward(logits: Tensor, targets: Tensor, options: LogitOptions) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    targets = targets.long().contiguous()
    dtype = custom_ops.compute_dtype(logits.dtype)
    logp, entropy, lse = (torch.empty(len(logits), dtype=dtype) for _ in range(3))
    bad = _lib().tppo_row_forward(
        byref(_described(logits)), targets.data_ptr(), logp.data_ptr(), entropy.data_ptr(), lse.data_ptr(),
        byref(_LogitOptions(*options)), torch.get_num_threads(),
    )  # fmt: skip
    if bad >= 0:
        raise IndexError(
            f"target {int(targets[bad])} is outside of the vocabulary of {logits.shape[1]}: give ids from 0, or {IGNORED}"
        )
    return logp, entropy, lse


def _rows_backward(
    logits: Tensor, targets: Tensor, saved: tuple[Tensor, Tensor, Tensor], grad_logp: Tensor | None,
    grad_entropy: Tensor | None, out: Tensor, options: LogitOptions,
) -> None:  # fmt: skip
    source = logits if logits.stride(1) == 1 else logits.contiguous()
    target = out if out.stride(1) == 1 else torch.empty(out.shape, dtype=out.dtype)
    targets = targets.long().contiguous()
    vectors = [None if x is None else x.to(saved[0].dtype).contiguous() for x in (*saved, grad_logp, grad_entropy)]
    _lib().tppo_row_backward(
        byref(_described(source)), targets.data_ptr(), *map(_pointer, vectors), byref(_described(target)),
        byref(_LogitOptions(*options)), torch.get_num_threads(),
    )  # fmt: skip
    if target is not out:
        out.copy_(target)


def _gae(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, lams: Tensor | None, bootstrap: Tensor | None,
    mask: Tensor | None, gamma: float, lam: float, advantages: Tensor, returns: Tensor, stats: Tensor,
) -> None:  # fmt: skip
    starts, actions = cu_seqlens.long(), rewards.shape[0]
    dtype, threads = DTYPES[rewards.dtype], torch.get_num_threads()
    bad = _lib().tppo_gae(
        dtype, *map(_pointer, (rewards, values, starts, lams, bootstrap, mask)), gamma, lam, starts.shape[0] - 1, actions,
        advantages.data_ptr(), returns.data_ptr(), threads,
    )  # fmt: skip
    if bad >= 0:
        checks.check_segments(starts, actions)
    if stats.numel():
        _lib().tppo_stats(dtype, advantages.data_ptr(), _pointer(mask), len(advantages), stats.data_ptr(), threads)


def _ppo(inputs: PpoInputs, options: PpoOptions, normalizer: Tensor | None, count: float, results: PpoResults) -> None:
    divisor = count if normalizer is None else normalizer.item()
    loss, metrics, grad_logp, grad_values = map(_pointer, results)
    _lib().tppo_ppo(
        DTYPES[inputs.logp.dtype], byref(_PpoInputs(*map(_pointer, inputs))), len(inputs.logp),
        byref(_PpoOptions(*options)), 1.0 / divisor if divisor else float("inf"), loss, metrics, grad_logp,
        None if inputs.values is None else grad_values, torch.get_num_threads(),
    )  # fmt: skip


def _stats(x: Tensor, mask: Tensor | None) -> Tensor:
    x, mask = x.to(custom_ops.compute_dtype(x.dtype)).contiguous(), None if mask is None else mask.contiguous()
    out = x.new_empty(3)
    _lib().tppo_stats(DTYPES[x.dtype], x.data_ptr(), _pointer(mask), len(x), out.data_ptr(), torch.get_num_threads())
    return out


rows = Rows(_rows_forward, _rows_backward)
logprobs_from_logits = custom_ops.logprobs_op("native", rows)
gae = custom_ops.gae_op("native", _gae)
ppo_loss = custom_ops.ppo_op("native", _ppo)
whitening_stats = custom_ops.stats_op("native", _stats)
whiten = custom_ops.whiten_of(whitening_stats)
linear_logprobs = linear_logprobs_op("native", rows)
linear_token_loss = linear_token_loss_op(rows, linear_logprobs)
