"""Every operation at the shapes of a model, through its own launchers: what the compile report compiles."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.gpu_sizes import CODEC_WIDTHS, sizes
from benchmarks.roofline import WAN_DISTINCT, workload
from ebr_engine.kernels import prompt_attention as attention
from ebr_engine.kernels import prompt_attention_gradient as attention_gradient
from ebr_engine.kernels.attention_fp8 import attention_fp8_launch, quantize_heads_launch
from ebr_engine.kernels.bridge_step import bridge_step_launch
from ebr_engine.kernels.channel_norm_silu import group_pixels_launch, rms_pixels_launch
from ebr_engine.kernels.context_kv import context_kv_launch
from ebr_engine.kernels.gated_activation import empty_joined, gated_activation_backward_launch, gated_activation_launch
from ebr_engine.kernels.gated_residual_norm import gated_residual_norm_backward_launch, gated_residual_norm_launch
from ebr_engine.kernels.layer_norm_modulate import layer_norm_modulate_backward_launch, layer_norm_modulate_launch
from ebr_engine.kernels.prompt_attention_persistent import TILES as PROMPT_TILES
from ebr_engine.kernels.prompt_attention_persistent import prompt_attention_persistent_launch
from ebr_engine.kernels.qk_norm_rope import qk_norm_rope_launch
from ebr_engine.kernels.qk_norm_rope_gradient import qk_norm_rope_backward_launch
from ebr_engine.kernels.qkv_norm_rope import TILES as QKV_TILES
from ebr_engine.kernels.qkv_norm_rope import qkv_norm_rope_launch
from ebr_engine.kernels.quantize_fp8 import empty_quantized, quantize_fp8_launch
from ebr_engine.kernels.scaled_linear import scaled_linear_launch
from ebr_engine.kernels.scaled_linear_persistent import FORMS as PERSISTENT_FORMS


class Shapes:
    """Tensors without memory, of the sizes that a model's operations meet; bf16 where no dtype is given."""

    def __init__(self, model: str, arch: int):
        self.arch = arch
        self.has_fp8, self.persistent = arch >= 89, arch in (90, 100)  # forms for Hopper and Blackwell's data centre parts
        s = sizes(model)
        self.wan, self.latent = not s.per_head, workload(model).latent
        self.width, self.heads, self.head, self.ffn, self.tokens, self.text = s.width, s.heads, s.head, s.ffn, s.tokens, s.text
        self.stream = self.bf16(1, self.tokens, self.width)
        self.table = self.wide(1, self.width)  # of modulations

    def bf16(self, *shape: int) -> Tensor:
        return torch.empty(shape, device="meta", dtype=torch.bfloat16)

    def wide(self, *shape: int) -> Tensor:
        return torch.empty(shape, device="meta")


def layer_norm_modulate(s: Shapes) -> None:
    layer_norm_modulate_launch(s.stream, s.table, s.table, 1e-6, torch.empty_like(s.stream))
    if s.has_fp8:
        layer_norm_modulate_launch(s.stream, s.table, s.table, 1e-6, *empty_quantized(s.stream))
    layer_norm_modulate_backward_launch(s.stream, s.stream, s.table, 1e-6)


def gated_residual_norm(s: Shapes) -> None:
    for gate in (s.table, None):
        gated_residual_norm_launch(s.stream, s.stream, gate, s.table, s.table, 1e-6, torch.empty_like(s.stream))
        if s.has_fp8:
            gated_residual_norm_launch(s.stream, s.stream, gate, s.table, s.table, 1e-6, *empty_quantized(s.stream))
        gated_residual_norm_backward_launch(s.stream, s.stream, s.stream, gate, s.table, 1e-6)


def gated_activation(s: Shapes) -> None:
    x = s.bf16(1, s.tokens, 2 * s.ffn)
    for beside in (None, s.stream):
        gated_activation_launch(x, beside, empty_joined(x, beside, torch.bfloat16))
        if s.has_fp8:
            gated_activation_launch(x, beside, *empty_quantized(empty_joined(x, beside, torch.bfloat16)))
    gated_activation_backward_launch(s.bf16(1, s.tokens, s.ffn), x)


def qk_norm_rope(s: Shapes) -> None:
    qkv, weight = s.bf16(1, s.tokens, 3 * s.width), s.bf16(s.width if s.wan else s.head)
    angles, gradient = s.wide(s.tokens, s.head // 2), s.bf16(1, s.heads, s.tokens, s.head)
    for rows in (None,) if s.wan else (None, s.bf16(s.text, 3 * s.width)):
        qk_norm_rope_launch(qkv, weight, weight, angles, angles, s.heads, 1e-6, rows)
        qk_norm_rope_backward_launch(gradient, gradient, gradient, qkv, weight, weight, angles, angles, 1e-6, rows)


def quantize_fp8(s: Shapes) -> None:
    if s.has_fp8:
        quantize_fp8_launch(s.stream)
        quantize_fp8_launch(s.bf16(1, s.tokens, s.ffn))


def prompt_attention(s: Shapes) -> None:
    if s.wan:
        q = s.bf16(1, s.tokens, s.heads, s.head).transpose(1, 2)
        text, prompt = s.bf16(1, s.heads, WAN_DISTINCT, s.head), s.bf16(1, s.heads, s.text, s.head)
        inputs = (q, text, text, s.wide(WAN_DISTINCT), prompt, prompt, s.wide(1))
        attention.prompt_attention_launch(*inputs, False)
        _, log_sum = attention.prompt_attention_launch(*inputs, True)
        attention_gradient.prompt_attention_backward_launch(q, *inputs, log_sum)


def prompt_attention_persistent(s: Shapes) -> None:
    if s.wan and s.persistent:
        q = s.bf16(1, s.tokens, s.heads, s.head).transpose(1, 2)
        text, prompt = s.bf16(1, s.heads, WAN_DISTINCT, s.head), s.bf16(1, s.heads, s.text, s.head)
        for form, capability in PROMPT_TILES:
            if capability == s.arch // 10:
                inputs = q, text, text, s.wide(WAN_DISTINCT), prompt, prompt, s.wide(1)
                prompt_attention_persistent_launch(*inputs, form)


def bridge_step(s: Shapes) -> None:
    state = s.wide(1, *s.latent)
    bridge_step_launch(state, state, state, s.wide(3))


def context_kv(s: Shapes) -> None:
    if s.wan:  # a block at a time or all: the number of rows is no part of a kernel
        context_kv_launch(s.wide(1, 1, s.text, 2 * s.width), s.wide(1, 2 * s.width), s.wide(1, s.width), s.heads, 1e-6)


def attention_fp8(s: Shapes) -> None:
    if s.has_fp8:
        heads = [s.bf16(1, s.heads, s.tokens, s.head) for _ in range(3)]
        attention_fp8_launch(*quantize_heads_launch(*heads), torch.bfloat16)


def channel_norm_silu(s: Shapes) -> None:
    pixels = s.latent[-2] * s.latent[-1]
    for x, groups in codec_features(s.wan, pixels):
        table, out = s.wide(x.shape[-1]), torch.empty_like(x)
        if groups:
            group_pixels_launch(x, table, table, groups, 1e-6, True, out)
        else:
            rms_pixels_launch(x, table, None, 1e-12, True, out)


def codec_features(wan: bool, pixels: int) -> list[tuple[Tensor, int]]:
    """Features of a codec at all of its widths, [frames, pixels, channels], and the groups of its norm."""
    shapes = CODEC_WIDTHS["wan" if wan else "flux"]
    found = [(frames, times * pixels, width) for width, times, frames in shapes]
    return [(torch.empty(shape, device="meta", dtype=torch.bfloat16), 0 if wan else 32) for shape in found]


def fp8_layers(s: Shapes) -> Iterator[tuple[tuple, Tensor | None]]:
    """The operands of a block's linear layers, and the bound of the one before a GELU."""
    if s.has_fp8:
        for inputs, outputs in ((s.width, 3 * s.width), (s.width, s.width), (s.width, s.ffn), (s.ffn, s.width)):
            factors = *empty_quantized(s.bf16(s.tokens, inputs)), *empty_quantized(s.bf16(outputs, inputs))
            yield (*factors, s.bf16(outputs)), s.wide(2) if (inputs, outputs) == (s.width, s.ffn) else None


def scaled_linear(s: Shapes, forms: Sequence[str] = ("tiles",)) -> None:
    for given, bound in fp8_layers(s):
        for form in forms:
            scaled_linear_launch(*given, None, False, torch.bfloat16, form)
            if bound is not None:
                scaled_linear_launch(*given, bound, True, torch.float8_e4m3fn, form)


def scaled_linear_persistent(s: Shapes) -> None:
    if s.persistent:
        scaled_linear(s, PERSISTENT_FORMS)


def qkv_norm_rope(s: Shapes) -> None:
    if not s.persistent or s.wan:  # whose norm is across heads
        return
    tables = s.bf16(s.head), s.bf16(s.head), *(s.wide(s.tokens, s.head // 2) for _ in range(2)), s.heads, 1e-6
    prompt, x, weight = s.bf16(s.text, 3 * s.width), s.stream, s.bf16(3 * s.width, s.width)
    for form, capability in QKV_TILES:
        if capability == s.arch // 10:
            qkv_norm_rope_launch(x, None, weight, None, s.bf16(3 * s.width), *tables, prompt, form)
            factors = *empty_quantized(x), *empty_quantized(weight)
            qkv_norm_rope_launch(*factors, s.bf16(3 * s.width), *tables, prompt, form)


OPERATIONS: dict[str, Callable[[Shapes], None]] = {
    function.__name__: function
    for function in (
        layer_norm_modulate,
        gated_residual_norm,
        gated_activation,
        qk_norm_rope,
        quantize_fp8,
        prompt_attention,
        context_kv,
        scaled_linear,
        scaled_linear_persistent,
        prompt_attention_persistent,
        qkv_norm_rope,
        attention_fp8,
        bridge_step,
        channel_norm_silu,
    )
}
