"""Every operation with inputs of a model's sizes, its plain form, and the library's nearest kernel: what the GPU check runs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu_sizes import CODEC_WIDTHS, Draw, Sizes, linear_inputs, persistent
from benchmarks.roofline import WAN_DISTINCT
from ebr_engine.kernels import (
    attention,
    attention_fp8,
    bridge_step,
    context_kv,
    gated_activation,
    prompt_attention,
    prompt_attention_persistent,
    qk_norm_rope,
    qkv_norm_rope,
    quantize_fp8,
    scaled_linear,
    scaled_linear_persistent,
)
from ebr_engine.kernels import gated_residual_norm as gated
from ebr_engine.kernels import layer_norm_modulate as norm
from ebr_engine.kernels.channel_norm_silu import channel_norm_silu, channel_norm_silu_ref

EPS = 1e-6
EXTENDED = ("layer_norm_modulate", "gated_residual_norm", "qk_norm_rope", "quantize_fp8")  # what the CUDA extension has


@dataclass(frozen=True)
class Case:
    """One form of an operation with its inputs.

    `reference` is the plain form, run at the inputs' precision; `exact` the formula where the reference rounds more than its
    output; `learned` the inputs whose gradients are checked. `library` is the nearest that torch has, by name; it may do less.
    """

    operation: str
    form: str
    inputs: dict[str, Any]
    function: Callable[..., Any]
    reference: Callable[..., Any]
    exact: Callable[..., Any] | None = None
    learned: tuple[str, ...] = ()
    flop: int = 0
    library: dict[str, Callable[..., Any]] = field(default_factory=dict)
    bits: bool = False  # the result has to equal the reference's bit by bit

    @property
    def name(self) -> str:
        return f"{self.operation} {self.form}".strip()


def leaves(result: Any) -> list[Tensor]:
    """The tensors of a result; quantised ones as the numbers that they stand for."""
    if isinstance(result, quantize_fp8.Quantized):
        return [result.values.double() * result.scale.double()]
    return [result] if isinstance(result, Tensor) else [leaf for part in result for leaf in leaves(part)]


def bytes_moved(case: Case, result: Any) -> int:
    """Every tensor that goes in or comes out, once."""

    def tensors(value: Any) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        return [t for part in value for t in tensors(part)] if isinstance(value, tuple) else []

    found = {id(t): t for value in (*case.inputs.values(), result) for t in tensors(value)}
    return sum(t.numel() * t.element_size() for t in found.values())


def cases(s: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[Callable[[], list[Case]]]:
    """Makers of the cases at these sizes, one after the other, so that the inputs of only one lie in memory."""
    draw = Draw(device, dtype)
    first = (norms, gated_norms, rotary, projected, quantised, activations, channel_norms)
    for make in (*first, self_attention, cross_attention, keys_values, step, linears):
        yield lambda make=make: make(s, draw)


def norms(s: Sizes, draw: Draw) -> list[Case]:
    x = draw(s.batch, s.tokens, s.width)
    inputs = {"x": x, "weight": draw.wide(s.batch, s.width, around=1.0, scale=0.3), "bias": draw.wide(s.batch, s.width)}
    inputs["eps"] = EPS

    def library(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight[0].to(x), bias[0].to(x), eps)

    return [
        Case(
            "layer_norm_modulate", "", inputs, norm.layer_norm_modulate, norm.layer_norm_modulate_ref,
            learned=("x",), library={"F.layer_norm": library} if s.batch == 1 else {},
        ),
        Case(
            "layer_norm_modulate", "fp8", inputs, norm.layer_norm_modulate_fp8, norm.layer_norm_modulate_fp8_ref,
            exact=norm.layer_norm_modulate_ref,
        ),
    ]  # fmt: skip


def gated_norms(s: Sizes, draw: Draw) -> list[Case]:
    inputs = {
        "x": draw(s.batch, s.tokens, s.width),
        "y": draw(s.batch, s.tokens, s.width),
        "gate": draw.wide(s.batch, s.width),
        "weight": draw.wide(s.batch, s.width, around=1.0, scale=0.3),
        "bias": draw.wide(s.batch, s.width),
        "eps": EPS,
    }

    def library(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = torch.addcmul(x, y, gate.to(x).unsqueeze(-2))
        return total, F.layer_norm(total, x.shape[-1:], weight[0].to(x), bias[0].to(x), eps)

    both = {"addcmul, F.layer_norm": library} if s.batch == 1 else {}
    return [
        Case(
            "gated_residual_norm", "", inputs, gated.gated_residual_norm, gated.gated_residual_norm_ref,
            learned=("x", "y"), library=both,
        ),
        Case(
            "gated_residual_norm", "fp8", inputs, gated.gated_residual_norm_fp8, gated.gated_residual_norm_fp8_ref,
            exact=gated.gated_residual_norm_ref,
        ),
        Case(
            "gated_residual_norm", "no gate", inputs | {"gate": None}, gated.gated_residual_norm,
            gated.gated_residual_norm_ref, learned=("x", "y"),
        ),
    ]  # fmt: skip


def rotary(s: Sizes, draw: Draw) -> list[Case]:
    weight = s.head if s.per_head else s.width
    angle = torch.rand(s.tokens, s.head // 2, device=draw.device) * 6
    inputs = {
        "qkv": draw(s.batch, s.tokens, 3 * s.width),
        "q_weight": draw.wide(weight, around=1.0, scale=0.3).to(draw.dtype),
        "k_weight": draw.wide(weight, around=1.0, scale=0.3).to(draw.dtype),
        "cos": angle.cos(),
        "sin": angle.sin(),
        "heads": s.heads,
        "eps": EPS,
        "rows": draw(s.text, 3 * s.width, scale=0.1) if s.per_head else None,
    }

    def library(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        parts = (x.unflatten(-1, (-1, weight)) for x in qkv.chunk(3, dim=-1)[:2])
        return tuple(F.rms_norm(x, (weight,), table, EPS) for x, table in zip(parts, (q_weight, k_weight)))

    learned = ("qkv", "rows") if s.per_head else ("qkv",)
    plain = qk_norm_rope.qk_norm_rope, qk_norm_rope.qk_norm_rope_ref
    return [Case("qk_norm_rope", "", inputs, *plain, learned=learned, library={"F.rms_norm of q and k alone": library})]


def projected(s: Sizes, draw: Draw) -> list[Case]:
    """The projection to heads in one kernel (each persistent form) beside the product and the pass, which is the plain form."""
    if not s.per_head or draw.dtype != torch.bfloat16 or not persistent(draw.device):
        return []
    (rope,) = rotary(s, draw)
    x, weight = draw(s.batch, s.tokens, s.width), draw(3 * s.width, s.width, scale=s.width**-0.5)
    inputs = {"x": x, "weight": weight, "bias": draw(3 * s.width)}
    inputs |= {name: value for name, value in rope.inputs.items() if name != "qkv"}

    def fused(form: str) -> Callable[..., Any]:
        def run(x: Tensor, weight: Tensor, bias: Tensor, **rest: Any) -> tuple[Tensor, ...]:
            given = x, None, weight, None, bias, *rest.values()
            if not x.is_cuda:  # a CPU has no form
                return qkv_norm_rope.qkv_norm_rope_ref(*given).unbind(0)
            return qkv_norm_rope.qkv_norm_rope_launch(*given, form).unbind(0)

        return run

    def apart(x: Tensor, weight: Tensor, bias: Tensor, **rest: Any) -> tuple[Tensor, ...]:
        return qk_norm_rope.qk_norm_rope_ref(F.linear(x, weight, bias), **rest)

    def library(x: Tensor, weight: Tensor, bias: Tensor, **rest: Any) -> tuple[Tensor, ...]:
        return qk_norm_rope.qk_norm_rope(F.linear(x, weight, bias), **rest)

    capability = torch.cuda.get_device_capability(draw.device)[0] if draw.device.type == "cuda" else 9
    flop = 6 * s.batch * s.tokens * s.width**2
    return [
        Case("qkv_norm_rope", form, inputs, fused(form), apart, flop=flop, library={"F.linear, qk_norm_rope": library})
        for form, major in qkv_norm_rope.TILES
        if major == capability
    ]


def quantised(s: Sizes, draw: Draw) -> list[Case]:
    functions = quantize_fp8.quantize_fp8, quantize_fp8.quantize_fp8_ref
    return [
        Case("quantize_fp8", form, {"x": draw(s.batch, s.tokens, width)}, *functions, exact=torch.clone, bits=True)
        for form, width in (("", s.width), ("feed-forward", s.ffn))
    ]


def activations(s: Sizes, draw: Draw) -> list[Case]:
    inputs = {"x": draw(s.batch, s.tokens, 2 * s.ffn), "beside": draw(s.batch, s.tokens, s.width)}

    def library(x: Tensor, beside: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return torch.cat((beside, F.silu(gate) * up), dim=-1)

    return [
        Case(
            "gated_activation", "", inputs, gated_activation.gated_activation, gated_activation.gated_activation_ref,
            learned=("x",), library={"F.silu, product, cat": library},
        ),
        Case(
            "gated_activation", "fp8", inputs, gated_activation.gated_activation_fp8,
            gated_activation.gated_activation_fp8_ref, exact=gated_activation.gated_activation_ref,
        ),
    ]  # fmt: skip


def channel_norms(s: Sizes, draw: Draw) -> list[Case]:
    """In front of the widest convolutions of the model's codec, at a latent of as many tokens; the plain form takes pixels."""
    width, times, frames = CODEC_WIDTHS["flux" if s.per_head else "wan"][0]
    if s.tokens < 100:
        width, times, frames = s.width, 1, s.batch
    groups = 4 if s.per_head else 0
    x = draw(frames, s.tokens, times, width).permute(0, 3, 1, 2)  # channels side by side
    inputs = {"x": x, "weight": draw.wide(width, around=1.0, scale=0.3), "bias": draw.wide(width) if groups else None}
    inputs |= {"groups": groups, "eps": EPS if groups else 1e-12, "silu": True}

    def plain(x: Tensor, **others: Any) -> Tensor:
        y = channel_norm_silu_ref(x.permute(0, 2, 3, 1).flatten(1, 2), **others)
        return y.unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)

    def library(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, eps: float, silu: bool) -> Tensor:
        weight, bias = (None if t is None else t.to(x) for t in (weight, bias))
        if groups:
            return F.silu(F.group_norm(x, groups, weight, bias, eps))
        return F.silu(F.normalize(x, dim=1) * x.shape[1] ** 0.5 * weight.view(-1, 1, 1))

    named = {"F.group_norm, F.silu" if groups else "F.normalize, F.silu": library}
    return [Case("channel_norm_silu", "groups" if groups else "rms", inputs, channel_norm_silu, plain, library=named)]


def self_attention(s: Sizes, draw: Draw) -> list[Case]:
    q, k, v = (draw(s.batch, s.heads, s.tokens, s.head) for _ in range(3))
    functions = attention.attention, attention.attention_ref
    flop = 4 * s.batch * s.tokens**2 * s.width
    library = {"F.scaled_dot_product_attention": F.scaled_dot_product_attention}
    # The library's names of its first three arguments are not ours, so they go in by position.
    library = {name: lambda q, k, v, call=call: call(q, k, v) for name, call in library.items()}
    usual = Case("attention", "", {"q": q, "k": k, "v": v}, *functions, learned=("q", "k", "v"), flop=flop, library=library)
    return [usual, *([eight_bits(usual)] if draw.dtype == torch.bfloat16 else [])]


def eight_bits(usual: Case) -> Case:
    """Attention in eight bits with the same inputs; plain is its reference, quantised alike, and exact is attention."""

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_fp8.attention_fp8_ref(*attention_fp8.quantize_heads_ref(q, k, v), q.dtype)

    changed = {"operation": "attention_fp8", "function": attention_fp8.attention_fp8, "reference": plain}
    return replace(usual, **changed, exact=usual.reference, learned=())


def cross_attention(s: Sizes, draw: Draw) -> list[Case]:
    if s.per_head:  # FLUX has none
        return []
    distinct = min(WAN_DISTINCT, s.text)
    counts = torch.ones(distinct, device=draw.device)
    counts[-1] = s.text - distinct + 1
    text = [draw(1, s.heads, distinct, s.head) for _ in range(2)]
    every = [x.repeat_interleave(counts.int(), dim=2, output_size=s.text).contiguous() for x in text]

    def made(prompts: int) -> dict[str, Any]:
        return {
            "q": draw(s.batch, s.tokens, s.heads, s.head).transpose(1, 2),
            "text_key": text[0],
            "text_value": text[1],
            "text_log_count": counts.log(),
            "prompt_key": draw(prompts, s.heads, s.text, s.head),
            "prompt_value": draw(prompts, s.heads, s.text, s.head),
            "prompt_weight": draw.wide(prompts, around=0.1, scale=0.05),
        }

    def released(q: Tensor, prompt_key: Tensor, prompt_value: Tensor, prompt_weight: Tensor, **_: Any) -> Tensor:
        out = F.scaled_dot_product_attention(q, *(x.expand(q.shape[0], -1, -1, -1) for x in every))
        for key, value, weight in zip(prompt_key, prompt_value, prompt_weight):
            branch = F.scaled_dot_product_attention(q, *(x.expand(q.shape[0], -1, -1, -1) for x in (key, value)))
            out = out + weight.to(q.dtype) * branch
        return out

    functions = prompt_attention.prompt_attention, prompt_attention.prompt_attention_ref
    learned = ("q", "prompt_key", "prompt_value", "prompt_weight")
    usual = [
        Case(
            "prompt_attention", form, made(prompts), *functions, learned=learned if prompts else ("q",),
            flop=4 * s.batch * s.tokens * s.width * (distinct + prompts * s.text),
            library={"two calls of F.scaled_dot_product_attention (released)": released} if prompts == 1 else {},
        )
        for form, prompts in (("", 1), ("no prompt", 0), ("2 prompts", 2))
    ]  # fmt: skip
    if draw.dtype != torch.bfloat16 or not persistent(draw.device):
        return usual

    def run(form: str) -> Callable[..., Tensor]:
        def launched(**given: Any) -> Tensor:
            if not (given["q"].is_cuda and prompt_attention_persistent.described(given["q"], given["prompt_key"])):
                return prompt_attention.prompt_attention_ref(**given)
            return prompt_attention_persistent.prompt_attention_persistent_launch(*given.values(), form)

        return launched

    capability = torch.cuda.get_device_capability(draw.device)[0] if draw.device.type == "cuda" else 9
    forms = [form for form, major in prompt_attention_persistent.TILES if major == capability]
    changed = {"operation": "prompt_attention_persistent", "learned": ()}
    return usual + [replace(usual[0], form=form, function=run(form), **changed) for form in forms]


def keys_values(s: Sizes, draw: Draw) -> list[Case]:
    if s.per_head:
        return []
    blocks = 2
    inputs = {
        "context": draw(1, s.text, s.width),
        "weight": draw(blocks, 2 * s.width, s.width, scale=s.width**-0.5),
        "bias": draw(blocks, 2 * s.width),
        "norm": draw.wide(blocks, s.width, around=1.0, scale=0.3).to(draw.dtype),
        "heads": s.heads,
        "eps": EPS,
    }
    functions = context_kv.context_kv, context_kv.context_kv_ref
    return [Case("context_kv", "", inputs, *functions, learned=("context",), flop=4 * blocks * s.text * s.width**2)]


def step(s: Sizes, draw: Draw) -> list[Case]:
    shape = s.batch, 16, s.tokens, 4  # a token is 2 × 2 cells of 16 channels
    inputs = {
        "x": draw.wide(*shape),
        "velocity": draw.wide(*shape),
        "degraded": draw.wide(*shape),
        "coefficients": draw.wide(3),
    }
    return [Case("bridge_step", "", inputs, bridge_step.bridge_step, bridge_step.bridge_step_ref)]


def linears(s: Sizes, draw: Draw) -> list[Case]:
    if draw.dtype != torch.bfloat16:
        return []
    inputs = linear_inputs(s.batch * s.tokens, s.width, s.ffn, draw)
    bound = scaled_linear.bound_ref(inputs["weight"], inputs["weight_scale"], inputs["bias"])

    def exact(values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
        return F.linear(values * scale, weight * weight_scale, bias)

    def ours(values: Tensor, scale: Tensor, *layer: Tensor, **how: Any) -> Any:
        return scaled_linear.scaled_linear(quantize_fp8.Quantized(values, scale), *layer, **how)

    def plain(*given: Tensor) -> Tensor:
        return scaled_linear.scaled_linear_ref(*given, False, draw.dtype)

    def plain_fp8(*given: Tensor) -> quantize_fp8.Quantized:
        return scaled_linear.scaled_linear_fp8_ref(*given, bound, True)

    def form(name: str, fused: bool) -> Callable[..., Any]:
        """One of Triton's forms, whatever a table says; on a CPU, which has none, the reference."""

        def run(**given: Tensor) -> Any:
            if not given["values"].is_cuda:
                return plain_fp8(*given.values()) if fused else plain(*given.values())
            how = (bound, True, torch.float8_e4m3fn) if fused else (None, False, draw.dtype)
            found = scaled_linear.scaled_linear_launch(*given.values(), *how, name)
            return quantize_fp8.Quantized(*found) if fused else found[0]

        return run

    fused = {"gelu": True, "fp8_out": True, "bound": bound}
    gelu = {"exact": lambda **given: F.gelu(exact(**given), approximate="tanh")}
    forms = ("tiles", *scaled_linear_persistent.FORMS) if persistent(draw.device) else ()
    return [
        Case(
            "scaled_linear", "", inputs, lambda **given: ours(*given.values()), lambda **given: plain(*given.values()),
            exact=exact,
        ),
        Case(
            "scaled_linear", "GELU, fp8", inputs, lambda **given: ours(*given.values(), **fused),
            lambda **given: plain_fp8(*given.values()), **gelu,
        ),
        *(
            Case(
                "scaled_linear_persistent", f"GELU, fp8, {name}" if fused else name, inputs, form(name, fused),
                lambda fused=fused, **given: (plain_fp8 if fused else plain)(*given.values()),
                **(gelu if fused else {"exact": exact}),
            )
            for fused in (False, True)
            for name in forms
        ),
    ]  # fmt: skip
