"""Launchers of the CUDA extension (`csrc/`, built as `ebr_engine._csrc`) for the operations it has.

Each computes what the operation of its name does, from the same arguments. What the extension has no kernel for (rows of odd
widths, memory that 16-byte loads cannot read, float64) takes the way it would take without the extension.
"""

import torch
from torch import Tensor

from ebr_engine import _csrc
from ebr_engine.kernels import backend
from ebr_engine.kernels.gated_residual_norm import (
    gated_residual_norm_fp8_ref,
    gated_residual_norm_launch,
    gated_residual_norm_ref,
)
from ebr_engine.kernels.layer_norm_modulate import (
    layer_norm_modulate_fp8_ref,
    layer_norm_modulate_launch,
    layer_norm_modulate_ref,
)
from ebr_engine.kernels.qk_norm_rope import check, qk_norm_rope_launch, qk_norm_rope_ref
from ebr_engine.kernels.quantize_fp8 import empty_quantized, quantize_fp8_launch, quantize_fp8_ref
from ebr_engine.kernels.rotary import dense_rows, row_strides
from ebr_engine.kernels.rows import batch_stride, dense, launches, launches_fp8

DTYPES = {getattr(torch, name): index for index, name in enumerate(_csrc.DTYPES)}
NONE = _csrc.Rows(0, 0, 0, 0)


def view(x: Tensor, batch: int = 0, token: int = 0) -> _csrc.Rows:
    """`x` as a kernel sees it; strides in elements from sample to sample and from token to token."""
    return _csrc.Rows(x.data_ptr(), batch, token, DTYPES[x.dtype])


def activations(x: Tensor) -> _csrc.Rows:
    """`x` [B, N, D]; the stride of a dimension of one is never taken, so it is not held against the alignment."""
    return view(x, *(0 if size == 1 else stride for size, stride in zip(x.shape[:2], x.stride()[:2])))


def shape_of(x: Tensor) -> _csrc.Shape:
    return _csrc.Shape(*x.shape)


def readable(*tensors: Tensor | None) -> bool:
    """Whether there is anything to do, in dtypes that the kernels read; `ValueError` if the tensors lie on several devices."""
    given = [x for x in tensors if x is not None]
    devices = {x.device for x in given}
    if len(devices) > 1:
        raise ValueError(f"tensors lie on {' and '.join(sorted(map(str, devices)))}: move them to one device")
    return all(x.dtype in DTYPES and x.numel() for x in given)


def stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream


def norm_tables(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[_csrc.Rows, _csrc.Rows]:
    """Modulation or affine weights [B or 1, D] for `x` [B, N, D]."""
    batch, _, width = x.shape
    return tuple(view(t, batch_stride(name, t, batch, width)) for name, t in (("weight", weight), ("bias", bias)))


def norm_served(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor, scale: Tensor | None = None) -> bool:
    """Whether the extension's layer_norm_modulate could do it, and did."""
    if not readable(x, weight, bias):
        return False
    x, weight, bias = dense(x), dense(weight), dense(bias)
    results = view(out), NONE if scale is None else view(scale)
    with backend.on(x):
        return _csrc.layer_norm_modulate(activations(x), *norm_tables(x, weight, bias), *results, shape_of(x), eps, stream(x))


def layer_norm_modulate(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if norm_served(x, weight, bias, eps, out):
        return out
    if not launches(x):
        return layer_norm_modulate_ref(x, weight, bias, eps).contiguous()
    layer_norm_modulate_launch(x, weight, bias, eps, out)
    return out


def layer_norm_modulate_fp8(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    values, scale = empty_quantized(x)
    if norm_served(x, weight, bias, eps, values, scale):
        return values, scale
    if not launches_fp8(x):
        return tuple(t.contiguous() for t in layer_norm_modulate_fp8_ref(x, weight, bias, eps))
    layer_norm_modulate_launch(x, weight, bias, eps, values, scale)
    return values, scale


def gated_served(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out: Tensor, scale: Tensor | None = None
) -> Tensor | None:
    """The new residual stream if the extension's gated_residual_norm could do it, else None."""
    if not readable(x, y, gate, weight, bias):
        return None
    if y.shape != x.shape:
        raise ValueError(f"y has shape {tuple(y.shape)}; that of x, {tuple(x.shape)}, was expected")
    x, y, weight, bias = dense(x), dense(y), dense(weight), dense(bias)
    gate = None if gate is None else dense(gate)
    gates = NONE if gate is None else view(gate, batch_stride("gate", gate, x.shape[0], x.shape[2]))
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    results = view(total), view(out), NONE if scale is None else view(scale)
    with backend.on(x):
        served = _csrc.gated_residual_norm(
            activations(x), activations(y), gates, *norm_tables(x, weight, bias), *results, shape_of(x), eps, stream(x)
        )
    return total if served else None


def gated_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = gated_served(x, y, gate, weight, bias, eps, out)
    if total is not None:
        return total, out
    if not launches(x):
        return tuple(t.contiguous() for t in gated_residual_norm_ref(x, y, gate, weight, bias, eps))
    return gated_residual_norm_launch(x, y, gate, weight, bias, eps, out), out


def gated_residual_norm_fp8(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    values, scale = empty_quantized(x)
    total = gated_served(x, y, gate, weight, bias, eps, values, scale)
    if total is not None:
        return total, values, scale
    if not launches_fp8(x):
        total, quantized = gated_residual_norm_fp8_ref(x, y, gate, weight, bias, eps)
        return tuple(t.contiguous() for t in (total, *quantized))
    return gated_residual_norm_launch(x, y, gate, weight, bias, eps, values, scale), values, scale


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check(qkv, q_weight, k_weight, cos, sin, heads, rows)
    batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    rows = dense_rows(rows)
    if readable(qkv, q_weight, k_weight, cos, sin, rows):
        qkv, q_weight, k_weight, cos, sin = dense(qkv), dense(q_weight), dense(k_weight), dense(cos), dense(sin)
        q, k, v = (qkv.new_empty(batch, heads, tokens, width // heads) for _ in range(3))
        by_sample, by_token, length = row_strides(rows)
        added = NONE if rows is None else view(rows, by_sample, by_token)
        tables = view(q_weight), view(k_weight), view(cos, 0, cos.stride(0)), view(sin, 0, sin.stride(0))
        per_head = q_weight.shape[0] == width // heads
        with backend.on(qkv):
            if _csrc.qk_norm_rope(
                activations(qkv), *tables, added, length, view(q), view(k), view(v),
                _csrc.Shape(batch, tokens, width), heads, per_head, eps, stream(qkv),
            ):  # fmt: skip
                return q, k, v
    if launches(qkv):
        return qk_norm_rope_launch(qkv, q_weight, k_weight, cos, sin, heads, eps, rows)
    results = qk_norm_rope_ref(qkv, q_weight, k_weight, cos, sin, heads, eps, rows)
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in results)  # v may be a view of qkv


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    values, scale = empty_quantized(x)
    if readable(x):
        x = x.contiguous()
        width = x.shape[-1]
        with backend.on(x):
            shape = _csrc.Shape(1, x.numel() // width, width)
            if _csrc.quantize_fp8(view(x, 0, width), view(values), view(scale), shape, stream(x)):
                return values, scale
    return quantize_fp8_launch(x) if launches_fp8(x) else tuple(t.contiguous() for t in quantize_fp8_ref(x))
