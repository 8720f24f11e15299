"""`python -m benchmarks.roofline`: operations and bytes of one trunk step, and the least time they take on a named GPU.

FLOPs are those of products, a multiply-add as two, and are checked against the real trunks by the tests. Bytes are what must
cross memory: a fused operation reads its inputs and writes its outputs once; *plain* is the same work as diffusers' eager modules
do it, every elementwise operation a pass, and with what the released algorithm does again at every step. An operation's floor is
the larger of FLOPs over the GPU's product rate and bytes over its bandwidth; a step's is the sum of its operations'. The time to
expect is the sum of both, as if products and memory never overlapped; a good implementation lies between. *fp8* has the large
linear layers of the blocks in e4m3 and everything else (attention too) in bf16, as the engine runs them; *all fp8* is the bound
if every product ran at the fp8 rate.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.gpus import GPUS, Gpu
from benchmarks.report import columns, commit, write_json
from ebr_engine.backbones.flux.config import MLP_RATIO, FluxConfig
from ebr_engine.backbones.flux.model import FREQUENCIES
from ebr_engine.backbones.flux2.model import Flux2Config
from ebr_engine.backbones.registry import named_configs
from ebr_engine.backbones.wan.model import MODULATIONS, WanConfig

BF16 = 2
STATE = 4  # the bridge state is float32
WAN_TEXT, WAN_DISTINCT = 226, 2  # rows of the empty text, and how many of them differ
FLUX_TEXT = 512
MODELS = (
    "wan-1.3b",
    "wan-14b",
    "flux-dev",
    "flux-schnell",
    "wan22-a14b",
    "wan22-5b",
    "flux2-klein-4b",
    "flux2-klein-9b",
    "flux2-dev",
)

# Bytes an element costs in diffusers' eager modules at bf16; w and r are a write and a read of 2 or 4 bytes.
PLAIN_WAN_NORM = 36  # to float32 (6), norm (8), × (1 + scale) (8), + shift (8), to bf16 (6)
PLAIN_WAN_GATED = 30  # to float32 (6), × gate (6), sum (12), to bf16 (6)
PLAIN_WAN_SUM, PLAIN_WAN_AFFINE = 6, 20  # x + y; to float32 (6), norm (8), to bf16 (6)
PLAIN_RMS = 4
PLAIN_WAN_ROPE = 22  # a half is two products in float32 (3 + 3) and their difference or sum (5)
PLAIN_FLUX_NORM, PLAIN_FLUX_GATED = 12, 10  # norm, ×, + (4 each); × gate (4), sum (6)
PLAIN_FLUX_ROPE = 52  # rotated copy (6), both to float32 (12), × cos, × sin (16), sum (12), to bf16 (6)
PLAIN_COPY = 4
PLAIN_GATE = 10  # SiLU (4), × (6)
PLAIN_STEP = 17  # float32 passes: t·v, D, three products and two sums


@dataclass(frozen=True)
class Operation:
    """One kind of operation of a step; numbers are of one execution, of which a step has `count`."""

    name: str
    count: int
    flop: int
    bytes: int
    plain_flop: int
    plain_bytes: int
    fp8: bool = False  # its products run in e4m3 when the trunk is fp8

    @property
    def saved(self) -> int:
        """Bytes a step that the fused form does not move."""
        return self.count * (self.plain_bytes - self.bytes)

    def seconds(self, gpu: Gpu, precision: str) -> tuple[float, float]:
        """Time of all executions' products and of their memory; `precision`: bf16, fp8, `all fp8`, or `plain` (bf16 too)."""
        rate = gpu.fp8 if precision == "all fp8" or (precision == "fp8" and self.fp8) else gpu.bf16
        flop, size = (self.plain_flop, self.plain_bytes) if precision == "plain" else (self.flop, self.bytes)
        return self.count * flop / (rate * 1e12), self.count * size / (gpu.bandwidth * 1e12)


@dataclass(frozen=True)
class Workload:
    """A backbone at a size: `latent` as the trunk takes it, without the batch."""

    backbone: str
    description: str
    config: WanConfig | FluxConfig | Flux2Config
    latent: tuple[int, ...]
    tokens: int  # of the picture or clip
    text: int  # text rows; Wan's are merged into `distinct` ones

    @property
    def pixels(self) -> int:
        return math.prod(self.latent)


def operation(
    name: str, count: int, flop: int, size: int, plain: int | None = None, again: int = 1, fp8: bool = False
) -> Operation:
    """An operation whose plain form moves `plain` bytes and does the same products `again` times."""
    return Operation(name, count, flop, size, again * flop, size if plain is None else plain, fp8)


def linear(name: str, count: int, rows: int, inputs: int, outputs: int, narrow: int, parts: int = 1, again: int = 1) -> Operation:
    """A linear layer; `narrow` bytes an element of input and weight; plainly `parts` layers that each read the input."""
    weight, written = inputs * outputs, BF16 * rows * outputs
    size = narrow * (rows * inputs + weight) + written
    plain = again * (BF16 * (parts * rows * inputs + weight) + written)
    return operation(name, count, 2 * rows * inputs * outputs, size, plain, again, narrow < BF16)


def quantize(name: str, count: int, rows: int, width: int, narrow: int) -> Iterator[Operation]:
    """The pass that an fp8 linear needs where no operation before it could write e4m3."""
    if narrow < BF16:
        yield operation(name, count, 0, rows * width * (BF16 + narrow), 0)


def wan_step(work: Workload, narrow: int = BF16, prompts: int = 1) -> list[Operation]:
    """The operations of one step of Wan; `narrow` bytes an element of what enters the fp8 linears (1) or bf16 ones (2)."""
    config, n = work.config, work.tokens
    width, ffn, blocks = config.width, config.ffn_dim, config.num_layers
    volume, element = config.patch_volume, n * config.width
    rows = prompts * WAN_TEXT  # every prompt has as many rows as the text
    cross = 4 * n * width
    time, text = (config.freq_dim + (1 + MODULATIONS) * width) * width, (config.text_dim + width) * width  # weights
    keys = 2 * (1 + prompts) * width * width  # weights of one block's K and V, once a context
    return [
        linear("patch_in", 1, n, volume * config.in_channels, width, BF16),
        operation("layer_norm_modulate", 1, 0, (BF16 + narrow) * element, PLAIN_WAN_NORM * element),
        linear("qkv", blocks, n, width, 3 * width, narrow, parts=3),
        operation("qk_norm_rope", blocks, 0, 6 * BF16 * element, 2 * (PLAIN_RMS + PLAIN_WAN_ROPE) * element),
        operation("attention", blocks, 4 * n * n * width, 4 * BF16 * element),
        *quantize("quantize_fp8 (attention)", blocks, n, width, narrow),
        linear("out", blocks, n, width, width, narrow),
        operation("gated_residual_norm (cross)", blocks, 0, 4 * BF16 * element, (PLAIN_WAN_GATED + PLAIN_WAN_AFFINE) * element),
        linear("cross_q", blocks, n, width, width, BF16, again=1 + prompts),
        operation("cross q norm", blocks, 0, 2 * BF16 * element, (1 + prompts) * PLAIN_RMS * element),
        Operation(
            "prompt_attention",
            blocks,
            cross * (WAN_DISTINCT + rows),
            2 * BF16 * element,
            cross * (WAN_TEXT + rows),
            (2 * BF16 * (1 + prompts) + (PLAIN_COPY + PLAIN_WAN_SUM) * prompts) * element,
        ),
        linear("cross_out", blocks, n, width, width, BF16, again=1 + prompts),
        operation(
            "gated_residual_norm (feed-forward)",
            blocks,
            0,
            (3 * BF16 + narrow) * element,
            (PLAIN_WAN_SUM + PLAIN_WAN_NORM) * element,
        ),
        gelu_linear("up + GELU", blocks, n, width, ffn, narrow),
        linear("down", blocks, n, ffn, width, narrow),
        operation(
            "gated_residual_norm (next)",
            blocks,
            0,
            (3 * BF16 + narrow) * element,
            (PLAIN_WAN_GATED + PLAIN_WAN_NORM) * element,
        ),
        linear("patch_out", 1, n, width, volume * config.out_channels, BF16),
        operation("bridge_step", 1, 0, 4 * STATE * work.pixels, PLAIN_STEP * STATE * work.pixels),
        Operation("time and text MLP (baked)", 1, 0, 0, 2 * (time + WAN_TEXT * text), BF16 * (time + text)),
        Operation("context_kv (baked)", blocks, 0, 0, 2 * WAN_TEXT * keys, BF16 * keys),
    ]


def gelu_linear(name: str, count: int, rows: int, inputs: int, outputs: int, narrow: int) -> Operation:
    """A linear layer whose epilogue is GELU (and e4m3): its output is written once and not read; plainly GELU is a pass."""
    layer = linear(name, count, rows, inputs, outputs, narrow)
    hidden = rows * outputs
    return replace(layer, bytes=layer.bytes - (BF16 - narrow) * hidden, plain_bytes=layer.plain_bytes + PLAIN_COPY * hidden)


def flux_step(work: Workload, narrow: int = BF16) -> list[Operation]:
    """The operations of one step of FLUX.1 or FLUX.2, as in `wan_step`; a prompt costs nothing but its rows' read."""
    config, n, t = work.config, work.tokens, work.text
    width, doubles, singles = config.width, config.num_layers, config.num_single_layers
    hidden, joint = config.hidden, n + work.text
    element, rows = joint * width, 3 * t * width  # a prompt's constant rows for q, k and v
    rope = 2 * (PLAIN_RMS + PLAIN_FLUX_ROPE)
    updated = (3 * BF16 + narrow) * element, (PLAIN_FLUX_GATED + PLAIN_FLUX_NORM) * element
    if isinstance(config, Flux2Config):  # whose blocks of a kind share their modulation
        modulations = (12 + 3 + 2) * width * width
        embedders = (1 + config.guidance_embeds) * (config.timestep_guidance_channels + width) * width
    else:
        modulations = (12 * doubles + 3 * singles + 2) * width * width
        embedders = (2 * FREQUENCIES + config.pooled_projection_dim + 3 * width) * width
    text = config.joint_attention_dim * width

    def streams(layer: Any, name: str, *sizes: int, **settings: Any) -> Iterator[Operation]:
        for stream, tokens in (("text", t), ("image", n)):
            yield layer(f"{stream} {name}", doubles, tokens, *sizes, narrow, **settings)

    single_rope = operation("qk_norm_rope (single)", singles, 0, 6 * BF16 * element + BF16 * rows, (rope + 6) * element)
    double_rope = replace(
        single_rope, name="qk_norm_rope (double)", count=doubles, plain_bytes=(rope + 3 * PLAIN_COPY + 6) * element
    )
    if config.gated:  # GELU's place is taken by an operation that reads both halves of up's output
        ups = streams(linear, "up", width, 2 * hidden)
        gates = [operation("gated_activation", doubles, 0, (2 * BF16 + narrow) * joint * hidden, PLAIN_GATE * joint * hidden)]
        single_up = linear("single up", singles, joint, width, 2 * hidden, narrow)
        size = (2 * BF16 + narrow) * joint * hidden + (BF16 + narrow) * element
        plain = PLAIN_GATE * joint * hidden + PLAIN_COPY * joint * (width + hidden)
        join = operation("gated_activation, joined", singles, 0, size, plain)
    else:
        ups, gates = streams(gelu_linear, "up + GELU", width, hidden), []
        single_up = gelu_linear("single up + GELU", singles, joint, width, hidden, narrow)
        size, plain = (1 + MLP_RATIO) * element * (BF16 + narrow), (1 + MLP_RATIO) * PLAIN_COPY * element
        join = operation("join attention and hidden", singles, 0, size, plain)
    return [
        linear("image_in", 1, n, config.in_channels, width, BF16),
        operation("layer_norm_modulate", 1, 0, (BF16 + narrow) * element, PLAIN_FLUX_NORM * element),
        *streams(linear, "qkv", width, 3 * width, parts=3),
        double_rope,
        operation("join q, k, v", doubles, 0, 6 * BF16 * element, 0),
        operation("attention", doubles + singles, 4 * joint**2 * width, 4 * BF16 * element),
        *quantize("quantize_fp8 (attention)", doubles, joint, width, narrow),
        *streams(linear, "out", width, width),
        operation("gated_residual_norm (feed-forward)", doubles, 0, *updated),
        *ups,
        *gates,
        *streams(linear, "down", hidden, width),
        operation("gated_residual_norm (next)", doubles, 0, *updated),
        linear("single qkv", singles, joint, width, 3 * width, narrow, parts=3),
        single_rope,
        single_up,
        join,
        linear("single out", singles, joint, width + hidden, width, narrow),
        operation("gated_residual_norm (single)", singles, 0, updated[0], updated[1] + PLAIN_COPY * element),
        linear("image_out", 1, n, width, config.in_channels, BF16),
        operation("bridge_step", 1, 0, 4 * STATE * work.pixels, PLAIN_STEP * STATE * work.pixels),
        Operation("AdaLN modulations (baked)", 1, 0, 0, 2 * modulations, BF16 * modulations),
        Operation("embedders (baked)", 1, 0, 0, 2 * (embedders + t * text), BF16 * (embedders + text)),
    ]


def in_place(work: Workload, narrow: int = BF16) -> list[tuple[str, Operation, tuple[Operation, ...], str]]:
    """What takes the place of operations of a step on request or by a table: its name, it, those, and the rate of its products.

    Persistent forms of a product have its operations and bytes, and so its floor.
    """
    every = {op.name: op for op in step(work, narrow)}
    usual, width = every["attention"], work.config.width
    joint = work.tokens + (work.text if isinstance(work.config, FluxConfig) else 0)
    # Read twice, written once in one byte an element, read again; the result written in bf16.
    found = [("attention_fp8", replace(usual, bytes=joint * width * (2 * 3 * BF16 + 2 * 3 + BF16)), (usual,), "all fp8")]
    if "single qkv" in every:
        apart = every["single qkv"], every["qk_norm_rope (single)"]
        less = 6 * BF16 * joint * width  # q, k and v, not written and not read
        found.append(("qkv_norm_rope", replace(apart[0], bytes=sum(op.bytes for op in apart) - less), apart, "bf16"))
    return found


def workload(backbone: str, height: int | None = None, width: int | None = None, frames: int = 33) -> Workload:
    """A backbone at a size in pixels (that of its spec when not given), and clips of 33 frames."""
    spec, config = named_configs()[backbone]
    height, width = height or spec.native_size[0], width or spec.native_size[1]
    cells = tuple(side // spec.codec_costs.spatial for side in (height, width))
    if isinstance(config, (FluxConfig, Flux2Config)):
        latent, tokens = (config.latent_channels, *cells), math.prod(cells) // math.prod(config.patch)
        return Workload(backbone, f"{height}x{width}", config, latent, tokens, FLUX_TEXT)
    grid = ((frames - 1) // spec.codec_costs.temporal + 1, *cells)
    tokens = math.prod(grid) // config.patch_volume
    return Workload(backbone, f"{height}x{width}, {frames} frames", config, (config.in_channels, *grid), tokens, WAN_TEXT)


def step(work: Workload, narrow: int = BF16) -> list[Operation]:
    """The operations of one step of a workload."""
    return (wan_step if isinstance(work.config, WanConfig) else flux_step)(work, narrow)


def analyse(work: Workload, gpu: Gpu) -> dict[str, Any]:
    """Every operation with its floors, the totals, and what each fusion saves; plain values, seconds and bytes."""
    bf16, fp8 = ({op.name: op for op in step(work, narrow)} for narrow in (BF16, 1))
    forms = {"plain": bf16, "bf16": bf16} | ({"fp8": fp8, "all fp8": fp8} if gpu.fp8 else {})
    rows, expected = [], dict.fromkeys(forms, 0.0)
    for name in fp8:  # it has all that bf16 has, and the passes that quantise
        op = bf16.get(name) or replace(fp8[name], bytes=0, plain_bytes=0)
        floors = {}
        for precision, ops in forms.items():
            times = ops[name].seconds(gpu, precision) if name in ops else (0.0, 0.0)
            floors[precision] = max(times)
            expected[precision] += sum(times)
        rows.append(asdict(op) | {"fp8_bytes": fp8[name].bytes, "saved": op.saved, "floor": floors})
    totals = {
        "flop": sum(op.count * op.flop for op in bf16.values()),
        "plain_flop": sum(op.count * op.plain_flop for op in bf16.values()),
        "bytes": sum(op.count * op.bytes for op in bf16.values()),
        "fp8_bytes": sum(op.count * op.bytes for op in fp8.values()),
        "plain_bytes": sum(op.count * op.plain_bytes for op in bf16.values()),
        "floor": {precision: sum(row["floor"][precision] for row in rows) for precision in forms},
        "expected": expected,
    }
    found = [
        {
            "form": name,
            "count": op.count,
            "bytes": op.bytes,
            "usual_bytes": sum(one.bytes for one in usual),
            "floor": max(op.seconds(gpu, rate)),
            "usual_floor": sum(max(one.seconds(gpu, "bf16")) for one in usual),
        }
        for name, op, usual, rate in in_place(work)
        if rate != "all fp8" or gpu.fp8
    ]
    return {
        "forms": found,
        "backbone": work.backbone,
        "size": work.description,
        "tokens": work.tokens,
        "text": work.text,
        "operations": rows,
        "totals": totals,
    }


def table(result: dict[str, Any], gpu: Gpu, name: str) -> str:
    """What a person reads of one workload."""
    total = result["totals"]
    precisions = list(total["floor"])

    def milliseconds(values: dict[str, float]) -> list[str]:
        return [f"{values[precision] * 1e3:.2f}" for precision in precisions]

    header = ["operation", "times", "GFLOP", "MB", "MB plain", "saved GB", *(f"{precision} ms" for precision in precisions)]
    rows = []
    for op in sorted(result["operations"], key=lambda op: -op["floor"]["plain"]):
        sizes = (op["flop"] / 1e9, op["bytes"] / 1e6, op["plain_bytes"] / 1e6, op["saved"] / 1e9)
        rows.append([op["name"], f"{op['count']}", *(f"{size:.1f}" for size in sizes), *milliseconds(op["floor"])])
    saved = (total["plain_bytes"] - total["bytes"]) / 1e9
    rows.append(["a step: floor", "", f"{total['flop'] / 1e9:.0f}", "", "", f"{saved:.1f}", *milliseconds(total["floor"])])
    rows.append(["a step: to expect", "", "", "", "", "", *milliseconds(total["expected"])])
    rates = f"{gpu.bf16:g} TFLOP/s bf16, " + (f"{gpu.fp8:g} fp8, " if gpu.fp8 else "") + f"{gpu.bandwidth:g} TB/s"
    lines = [
        f"{result['backbone']}, {result['size']}: {result['tokens']} tokens and {result['text']} text rows, one step",
        f"on {name}: {rates} ({gpu.source})",
        "",
        columns(header, rows),
        "",
        f"products {total['flop'] / 1e12:.1f} TFLOP (plain {total['plain_flop'] / 1e12:.1f}), "
        f"memory {total['bytes'] / 1e9:.0f} GB (plain {total['plain_bytes'] / 1e9:.0f}, fp8 {total['fp8_bytes'] / 1e9:.0f})",
        *(
            f"{form['form']}: {form['floor'] * 1e3:.2f} ms at least in place of {form['usual_floor'] * 1e3:.2f}, "
            f"{form['count'] * form['bytes'] / 1e9:.1f} GB in place of {form['count'] * form['usual_bytes'] / 1e9:.1f}"
            for form in result["forms"]
        ),
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of one backbone or of all, and write everything to a JSON file on request."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", choices=MODELS, help="default: all")
    parser.add_argument("--gpu", choices=GPUS, default="h200")
    parser.add_argument("--bf16", type=float, metavar="TFLOPS", help="another product rate than the named GPU's")
    parser.add_argument("--fp8", type=float, metavar="TFLOPS")
    parser.add_argument("--bandwidth", type=float, metavar="TBPS")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="default: the backbone's own")
    parser.add_argument("--frames", type=int, default=33, help="of a clip, 4n + 1")
    parser.add_argument("--devices", type=int, nargs="+", metavar="N", help="messages of several instead: see parallel_cost")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number")
    options = parser.parse_args(arguments)
    if options.devices:
        from benchmarks import parallel_cost

        parallel_cost.main([*map(str, ["--devices", *options.devices]), *(["--json", str(options.json)] if options.json else [])])
        return
    given = {key: getattr(options, key) for key in ("bf16", "fp8", "bandwidth") if getattr(options, key) is not None}
    if any(value <= 0 for value in given.values()):
        parser.error("rates must be positive")
    if options.frames < 1 or options.frames % 4 != 1:
        parser.error(f"--frames must be 4n + 1, got {options.frames}")
    chosen = [options.backbone] if options.backbone else MODELS
    for name in chosen if options.size else ():
        spec, config = named_configs()[name]
        multiple = spec.codec_costs.spatial * config.patch[-1]
        if any(side < multiple or side % multiple for side in options.size):
            parser.error(f"--size must be multiples of {multiple} for {name}")
    gpu = GPUS[options.gpu]
    if given:
        gpu = replace(gpu, **given, source=f"{gpu.source}; given: {', '.join(given)}")
    results = [analyse(workload(name, *(options.size or (None, None)), options.frames), gpu) for name in chosen]
    print("\n\n".join(table(result, gpu, options.gpu) for result in results))
    if options.json:
        about = {"gpu": {"name": options.gpu, **asdict(gpu)}, "commit": commit()}
        write_json(options.json, about | {"workloads": results})


if __name__ == "__main__":
    main()
