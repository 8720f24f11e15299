"""`python -m benchmarks.quality steps|evaluations|blur|flat|clips|fp8|int8|colour-fix|auto-task`: what choices cost on `mini`.

*steps*: see `steps.py`; *evaluations*: see `evaluations.py`; *blur*: see `deblurring.py`; *flat*: see
`flat_noise.py`; *clips*: see `clips.py`.

*fp8*: PSNR of every task and photo of `ebr-engine eval`, restored with the trunk in float32, with its fp8 layers, and with
attention in eight bits, emulated. Attention: its error with q, k and v that a photograph gives at the real heads. Layers:
random weights, and activations as a LayerNorm gives them, at the sizes of Wan 2.1 and FLUX; the error is relative, against the
layer in float64, and bf16's is beside it.

*colour-fix*: the same photos and degradations, each restored once by its task's prompt (seed 42) and corrected in every way of
`media/colour_fix.py`. `BY_TASK` in that file names, for rain, snow and blur, the way that is best on average; haze and low light
keep none, whatever is measured, because there the input's low frequencies are the damage; the table has what it should be.

*auto-task*: see `auto_task.py`. *int8*: see `int8.py`.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import auto_task, clips, deblurring, evaluations, flat_noise, int8, report, steps
from benchmarks.clock import relative_rms
from benchmarks.report import Benchmark, columns, mean
from ebr_engine.backbones.layers import Fp8Linear, feed_forward
from ebr_engine.engine.restorer import Restorer
from ebr_engine.evaluation import quality
from ebr_engine.evaluation.photos import NAMES, make_case
from ebr_engine.kernels.attention import attention_ref
from ebr_engine.kernels.attention_fp8 import attention_fp8
from ebr_engine.media.colour_fix import BY_TASK, FIXES, NONE, fix_colours
from ebr_engine.prompts.catalogue import TASKS

WIDTHS = {"wan-1.3b": (1536, 8960), "wan-14b": (5120, 13824), "flux-dev": (3072, 12288)}
ROWS = 64  # tokens that a layer's error is measured on
HEADS, HEAD = {"wan-1.3b": 12, "flux-dev": 24}, 128
NOISES = (0.0, 0.4, 1.0, None)  # that a photo is under, 0.4 as Wan's and FLUX's latents in the beginning; or without a photo
DAMAGED_COLOURS = ("haze", "lowlight")
WORTH = 0.05  # dB that a correction has to gain to be a default


def main(arguments: Sequence[str] | None = None) -> None:
    """One of the nine."""
    report.main("quality", __doc__, BENCHMARKS, arguments)


def fp8_options(parser: ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=128, help="side of the photos in pixels")
    parser.add_argument("--quick", action="store_true", help="one photo and small layers, to try the benchmark itself")


def fp8(options: Namespace) -> dict[str, Any]:
    """What fp8 costs: PSNR of `mini` on real photos, and each layer's error at the real widths."""
    widths = {"tiny": (64, 160)} if options.quick else WIDTHS
    psnr = fp8_psnr(options.size, options.quick)
    return {"size": options.size, "psnr": psnr, "layers": layers(widths), "attention": attention_errors(options.quick)}


def fp8_psnr(size: int, quick: bool) -> dict[str, dict[str, float]]:
    """{task: mean PSNR in dB of float32, fp8 layers and fp8 attention}."""
    tasks, photos = (TASKS[:1], NAMES[:1]) if quick else (TASKS, NAMES)
    scores: dict[str, dict[str, float]] = {}
    for precision in ("fp32", "fp8", "fp8 attention"):
        eight_bits = precision == "fp8 attention"
        restorer = Restorer("mini", device="cpu", precision="fp32" if eight_bits else precision, fp8_attention=eight_bits)
        rows = quality.means(quality.measure(restorer, tasks, photos, size, rows=("EBR prompt",)))
        for task, row in rows.items():
            scores.setdefault(task, {})[precision] = row["EBR prompt"]
    return scores


def layers(widths: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """Relative RMS error of every kind of quantised layer, and of the fused feed-forward, in fp8 and in bf16."""

    def made(inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs).requires_grad_(False)

    torch.manual_seed(0)
    found = []
    for name, (width, hidden) in widths.items():
        x = torch.nn.functional.layer_norm(torch.randn(ROWS, width), (width,))
        up, down = made(width, hidden), made(hidden, width)
        for layer, linear in {"qkv": made(width, 3 * width), "out": made(width, width), "up": up}.items():
            exact = x.double() @ linear.weight.double().T + linear.bias.double()
            bf16 = x.bfloat16().float() @ linear.weight.bfloat16().float().T + linear.bias.bfloat16().float()
            row = {"fp8": relative_rms(Fp8Linear(linear)(x), exact), "bf16": relative_rms(bf16.bfloat16(), exact)}
            found.append({"model": name, "layer": layer, **row})
        with torch.no_grad():
            exact = feed_forward(up.double(), down.double(), x.double())
            up, down = Fp8Linear(up.float()), Fp8Linear(down.float())
            row = {"fp8": relative_rms(feed_forward(up, down, x), exact)}
            found.append({"model": name, "layer": "up, GELU, down", **row})
    return found


def attention_errors(quick: bool) -> list[dict[str, Any]]:
    """Relative RMS error of attention in eight bits and in bf16, of one head, by how alike the tokens are."""
    found = []
    for model, heads in (("tiny", 2),) if quick else HEADS.items():
        for noise in NOISES:
            q, k, v = (x[:1] for x in photo_heads(noise, heads, 16 if quick else HEAD))
            exact = attention_ref(q.double(), k.double(), v.double())
            row = {"fp8": relative_rms(attention_fp8(q, k, v), exact)}
            row["bf16"] = relative_rms(attention_ref(*(x.bfloat16() for x in (q, k, v))), exact)
            found.append({"model": model, "noise": noise, **row})
    return found


def photo_heads(noise: float | None, heads: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [heads, 1, N, head] of a photo's patches by random weights, q and k normed over the width, as Wan's are.

    `noise`: standard deviation of what is added to the pixels, in units of a half of their range; None leaves nothing else.
    """
    torch.manual_seed(0)
    clean = make_case(NAMES[0], TASKS[0], 512).clean * 2 - 1
    patches = torch.nn.functional.unfold(clean, 16, stride=16)[0].T  # [1024, 768]
    grain = torch.randn_like(patches)
    patches = grain if noise is None else patches + noise * grain
    inside, width = patches.shape[1], heads * head
    x = torch.nn.functional.layer_norm(patches @ torch.randn(inside, width) / inside**0.5, (width,))
    q, k, v = (x @ torch.randn(width, width) / width**0.5 for _ in range(3))
    q, k = (torch.nn.functional.rms_norm(x, (width,)) for x in (q, k))
    return tuple(x.unflatten(-1, (heads, head)).transpose(0, 1).unsqueeze(1) for x in (q, k, v))


def fp8_table(result: dict[str, Any]) -> str:
    """What a person reads."""
    kinds = ("fp8", "fp8 attention")
    psnr = []
    for task, row in result["psnr"].items():
        changes = (text for kind in kinds for text in (f"{row[kind]:.2f}", f"{row[kind] - row['fp32']:+.3f}"))
        psnr.append((task, f"{row['fp32']:.2f}", *changes))
    rows = list(result["psnr"].values())
    changes = (f"{mean(rows, kind) - mean(rows, 'fp32'):+.3f}" for kind in kinds)
    psnr.append(("mean", "", *(text for change in changes for text in ("", change))))
    attention = [
        (row["model"], "alone" if row["noise"] is None else f"{row['noise']:g}", f"{row['fp8']:.2%}", f"{row['bf16']:.2%}")
        for row in result["attention"]
    ]
    errors = [
        (f"{row['model']} {row['layer']}", f"{row['fp8']:.2%}", f"{row['bf16']:.2%}" if "bf16" in row else "")
        for row in result["layers"]
    ]
    title = f"mini, {result['size']} x {result['size']}, PSNR in dB"
    tables = (
        columns(("task", "float32", "fp8", "change", "fp8 attention", "change"), psnr),
        columns(("layer's relative error", "fp8", "bf16"), errors),
        columns(("attention's relative error", "noise in the photo", "fp8", "bf16"), attention),
    )
    return "\n\n".join((f"{title}\n{tables[0]}", *tables[1:]))


def colour_options(parser: ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=256, help="side of the photos in pixels")
    parser.add_argument("--quick", action="store_true", help="one photo, two tasks, to try the benchmark itself")


def colours(options: Namespace) -> dict[str, Any]:
    """What giving a restored picture the colours of its input does to `mini`'s results."""
    scores = colour_scores(options.size, options.quick)
    return {"size": options.size, "scores": scores, "best": best(scores)}


def colour_scores(size: int, quick: bool) -> list[dict[str, Any]]:
    """PSNR in dB of every photo, task and way: {task, photo, input, none, wavelet, adain}."""
    restorer = Restorer("mini", device="cpu", precision="fp32")
    scores = []
    for task in ("haze", "rain") if quick else TASKS:
        plan = restorer.plan(task)
        for photo in NAMES[:1] if quick else NAMES:
            case = make_case(photo, task, size)
            source = case.degraded[0].permute(1, 2, 0).numpy()
            restored = restorer.run(case.degraded, plan)[0].permute(1, 2, 0).numpy()
            record = {"task": task, "photo": photo, "input": quality.psnr(case.degraded, case.clean)}
            for fix in FIXES:
                fixed = torch.from_numpy(fix_colours(restored, source, fix)).permute(2, 0, 1)[None]
                record[fix] = quality.psnr((fixed * 255).round() / 255, case.clean)
            scores.append(record)
    return scores


def colour_means(scores: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean over photos: {task: {way: dB}}."""
    tasks = dict.fromkeys(score["task"] for score in scores)
    rows = {task: [score for score in scores if score["task"] == task] for task in tasks}
    return {task: {way: mean(found, way) for way in ("input", *FIXES)} for task, found in rows.items()}


def best(scores: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The default that each task should have: none, unless another way gains `WORTH` and the input's colours are no damage."""
    chosen = {}
    for task, row in colour_means(scores).items():
        way = max(FIXES, key=row.__getitem__)
        chosen[task] = way if task not in DAMAGED_COLOURS and row[way] >= row[NONE] + WORTH else NONE
    return chosen


def colour_table(result: dict[str, Any]) -> str:
    """What a person reads."""
    rows = [
        (task, *(f"{row[way]:.2f}" for way in ("input", *FIXES)), result["best"][task], BY_TASK[task])
        for task, row in colour_means(result["scores"]).items()
    ]
    title = f"mini, {result['size']} x {result['size']}, PSNR in dB, mean of the photos"
    return "\n".join([title, columns(("task", "input", *FIXES, "best default", "BY_TASK"), rows)])


BENCHMARKS = {
    "steps": Benchmark(steps.options, steps.measure, steps.table, steps.plot),
    "evaluations": Benchmark(evaluations.options, evaluations.measure, evaluations.table),
    "blur": Benchmark(deblurring.options, deblurring.measure, deblurring.table),
    "flat": Benchmark(flat_noise.options, flat_noise.measure, flat_noise.table),
    "clips": Benchmark(clips.options, clips.measure, clips.table),
    "fp8": Benchmark(fp8_options, fp8, fp8_table),
    "int8": Benchmark(int8.options, int8.measure, int8.table),
    "colour-fix": Benchmark(colour_options, colours, colour_table),
    "auto-task": Benchmark(auto_task.options, auto_task.measure, auto_task.table),
}

if __name__ == "__main__":
    main()
