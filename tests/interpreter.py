"""Fix bf16 in Triton's interpreter, which up to version 3.9 silently computes with the raw bits.

Products and arithmetic convert their operands to fp32; bf16 results are rounded to nearest even.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def install():
    """Patch the interpreter's products and arithmetic; later calls do nothing."""
    if getattr(InterpreterBuilder, "bf16_is_mended", False):
        return
    InterpreterBuilder.bf16_is_mended = True
    dot, binary, unary = InterpreterBuilder.create_dot, InterpreterBuilder.binary_op, InterpreterBuilder.unary_op

    def create_dot(self, a, b, *rest, **options):
        return dot(self, *(_widen(t) if _is_bf16(t) else t for t in (a, b)), *rest, **options)

    def binary_op(self, left, right, op):
        if not (_is_bf16(left) and _is_bf16(right)):
            return binary(self, left, right, op)
        out = binary(self, _widen(left), _widen(right), op).data
        return TensorHandle(out, tl.int1) if out.dtype == np.bool_ else TensorHandle(_round(out), tl.bfloat16)

    def unary_op(self, value, op):
        if not _is_bf16(value):
            return unary(self, value, op)
        return TensorHandle(_round(unary(self, _widen(value), op).data), tl.bfloat16)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.unary_op = unary_op


def _is_bf16(handle):
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _widen(handle):
    bits = handle.data.astype(np.uint16, copy=False).astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


def _round(values):
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
