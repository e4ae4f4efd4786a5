"""Makes Triton's interpreter honest about bfloat16, and quick. For tests only; load it after TRITON_INTERPRET=1 is set.

The interpreter keeps bfloat16 as raw 16-bit integers: fp32 -> bf16 truncates, and arithmetic or ``tl.dot`` on two bf16
operands works on the integers. It also replaces the language's names again at each call of a device function, and lists
all dtypes again for each that it looks up, which takes longer than the rest. Seen with triton 3.6.0 and 3.7.1.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np


def widen(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """To nearest, ties to even, as the hardware does."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    u = x.view(np.uint32)
    rounded = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded.astype(np.uint16))


def patch() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "bf16_is_honest", False):
        return
    builder.bf16_is_honest = True
    cast, to_fp, binary, unary, dot = (
        builder.cast_impl, builder.create_fp_to_fp, builder.binary_op, builder.unary_op, builder.create_dot
    )  # fmt: skip
    comparisons = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)

    def is_bf16(x):
        return x.dtype.scalar == tl.bfloat16

    def up(x):
        return handle(widen(x.data), tl.float32) if is_bf16(x) else x

    def down(x):
        return handle(narrow(x.data), tl.bfloat16)

    def converted(x, wanted):
        pair = x.dtype.scalar, wanted.scalar
        return down(x) if pair == (tl.float32, tl.bfloat16) else up(x) if pair == (tl.bfloat16, tl.float32) else None

    def patched_binary(self, a, b, op):
        if not (is_bf16(a) and is_bf16(b)):
            return binary(self, a, b, op)
        return (
            handle(op(up(a).data, up(b).data), tl.int1) if op in comparisons else down(binary(self, up(a), up(b), op))
        )

    builder.cast_impl = lambda self, x, wanted: converted(x, wanted) or cast(self, x, wanted)
    builder.create_fp_to_fp = lambda self, x, wanted, mode: converted(x, wanted) or to_fp(self, x, wanted, mode)
    builder.binary_op = patched_binary
    builder.unary_op = lambda self, x, op: down(unary(self, up(x), op)) if is_bf16(x) else unary(self, x, op)
    builder.create_dot = lambda self, a, b, *rest: dot(self, up(a), up(b), *rest)
    replace_names, np_dtype, replaced, dtypes = interpreter._patch_lang, interpreter._get_np_dtype, set(), {}

    def replace_names_once(fn):
        if id(fn.__globals__) not in replaced:
            replaced.add(id(fn.__globals__))
            replace_names(fn)
        return SimpleNamespace(restore=lambda: None)  # they stay: nothing is compiled in this process

    def known_np_dtype(x):
        if x.name not in dtypes:
            dtypes[x.name] = np_dtype(x)
        return dtypes[x.name]

    interpreter._patch_lang, interpreter._get_np_dtype = replace_names_once, known_np_dtype
