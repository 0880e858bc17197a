"""The card and its measured speed at the model's shapes; shares in later rows refer to these ceilings."""

from __future__ import annotations

import torch
from machine import commit, versions
from rows import AbsentError, Line
from setting import Setting
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from wbdit import ops

BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)


def card(s: Setting) -> None:
    """Write the card and the versions of the software."""
    s.rows.attempt("card", lambda: _card(s))


def _card(s: Setting) -> Line:
    triton = "none"
    try:
        import triton as module

        triton = module.__version__
    except ImportError:
        pass
    found: Line = {"versions": versions(), "triton": triton, "commit": commit(), "quick": s.quick}
    if not s.on_gpu:
        return {**found, "card": "CPU"}
    properties = torch.cuda.get_device_properties(s.device)
    return {
        **found,
        "card": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "serving": ops.serving("cuda"),
    }


def ceilings(s: Setting) -> None:
    """Measure a copy, products at 8,192 cubed and at the model's shapes, and PyTorch's attention."""
    s.rows.attempt("copy", lambda: _copy(s))
    bf16, fp32 = torch.bfloat16, torch.float32
    size = 128 if s.quick else 8192
    for dtype in (bf16, fp32):
        s.rows.attempt(f"mm {_short(dtype)}", lambda dtype=dtype: _product(s, (size, size, size), dtype))
    d = 32 if s.quick else 768
    for cells in (1024, 82):  # 204,800 and 16,400 tokens
        rows = 16 if s.quick else 200 * cells
        shape = f"{200 * cells} x 768 x 768"
        s.rows.attempt(f"mm bf16 {shape}", lambda rows=rows: _product(s, (rows, d, d), bf16))
        s.rows.attempt(f"addmm_ bf16 {shape}", lambda rows=rows: _product(s, (rows, d, d), bf16, added=True))
    for backend in BACKENDS:
        s.rows.attempt(f"sdpa {backend.name.lower()}", lambda backend=backend: _attention(s, backend))
    s.rows.attempt("sdpa backward", lambda: _attention_backward(s))


def _copy(s: Setting) -> Line:
    source = torch.randn(2**16 if s.quick else 2**28, device=s.device)
    target = torch.empty_like(source)
    found = s.timer.measure(lambda: target.copy_(source))
    return {**found, "bytes_per_second": 2 * source.nbytes / found["seconds"]}


def _product(s: Setting, shape: tuple[int, int, int], dtype: torch.dtype, added: bool = False) -> Line:
    m, n, k = shape
    a, b = (torch.randn(size, device=s.device).to(dtype) for size in ((m, k), (k, n)))
    out = torch.zeros(m, n, device=s.device, dtype=dtype)
    step = (lambda: out.addmm_(a, b, alpha=1e-3)) if added else (lambda: torch.mm(a, b, out=out))
    found = s.timer.measure(step)
    return {**found, "flops_per_second": 2 * m * n * k / found["seconds"]}


def _operand(s: Setting) -> Tensor:
    shape = (2, 2, 20, 96) if s.quick else (1024, 8, 200, 96)
    return torch.randn(shape, device=s.device).to(torch.bfloat16)


def _attention(s: Setting, backend: SDPBackend) -> Line:
    w = _operand(s)
    with torch.no_grad(), sdpa_kernel(backend):
        try:
            found = s.timer.measure(lambda: scaled_dot_product_attention(w, w, w))
        except RuntimeError as error:
            if "No viable backend" in str(error):
                raise AbsentError("PyTorch does not support this attention kernel on this card") from error
            raise
    return {**found, "flops_per_second": 4 * w.numel() * w.shape[2] / found["seconds"]}


def _attention_backward(s: Setting) -> Line:
    w = _operand(s).requires_grad_()
    out = scaled_dot_product_attention(w, w, w)
    upstream = torch.randn_like(out)
    found = s.timer.measure(lambda: torch.autograd.grad(out, w, upstream, retain_graph=True))
    return {**found, "flops_per_second": 10 * w.numel() * w.shape[2] / found["seconds"]}


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
