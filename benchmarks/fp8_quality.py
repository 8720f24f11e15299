"""`python -m benchmarks.fp8_quality`: what fp8 costs: PSNR of `mini` on real photos, and each layer's error at the real widths.

PSNR: every task and photo of `ebr-engine eval`, restored with the trunk in float32 and with its fp8 layers. Layers: random
weights, and activations as a LayerNorm gives them, at the sizes of Wan 2.1 and FLUX; the error is relative, against the layer
in float64, and bf16's is beside it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import columns, provenance, told, write_json

WIDTHS = {"wan-1.3b": (1536, 8960), "wan-14b": (5120, 13824), "flux-dev": (3072, 12288)}
ROWS = 64  # tokens that a layer's error is measured on


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, and write everything to a JSON file on request."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8_quality", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=128, help="side of the photos in pixels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number")
    parser.add_argument("--quick", action="store_true", help="one photo and small layers, to try the benchmark itself")
    options = parser.parse_args(arguments)
    result = {
        "size": options.size,
        "psnr": quality(options.size, options.quick),
        "layers": layers({"tiny": (64, 160)} if options.quick else WIDTHS),
        **provenance(),
    }
    print(table(result))
    if options.json:
        write_json(options.json, result)


def quality(size: int, quick: bool) -> dict[str, dict[str, float]]:
    """{task: mean PSNR in dB of float32 and fp8}."""
    from ebr_engine.engine.restorer import Restorer
    from ebr_engine.evaluation.photos import NAMES
    from ebr_engine.evaluation.quality import means, measure
    from ebr_engine.prompts.catalogue import TASKS

    tasks, photos = (TASKS[:1], NAMES[:1]) if quick else (TASKS, NAMES)
    scores: dict[str, dict[str, float]] = {}
    for precision in ("fp32", "fp8"):
        restorer = Restorer("mini", device="cpu", precision=precision)
        for task, rows in means(measure(restorer, tasks, photos, size, rows=("EBR prompt",))).items():
            scores.setdefault(task, {})[precision] = rows["EBR prompt"]
    return scores


def layers(widths: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """Relative RMS error of every kind of quantised layer, and of the fused feed-forward, in fp8 and in bf16."""
    import torch
    from torch import nn

    from ebr_engine.backbones.layers import Fp8Linear, feed_forward

    def error(value: torch.Tensor, exact: torch.Tensor) -> float:
        return float((value.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    def made(inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs).requires_grad_(False)

    torch.manual_seed(0)
    found = []
    for name, (width, hidden) in widths.items():
        x = torch.nn.functional.layer_norm(torch.randn(ROWS, width), (width,))
        up, down = made(width, hidden), made(hidden, width)
        parts = {"qkv": made(width, 3 * width), "out": made(width, width), "up": up}
        for layer, linear in parts.items():
            exact = x.double() @ linear.weight.double().T + linear.bias.double()
            bf16 = x.bfloat16().float() @ linear.weight.bfloat16().float().T + linear.bias.bfloat16().float()
            row = {"fp8": error(Fp8Linear(linear)(x), exact), "bf16": error(bf16.bfloat16(), exact)}
            found.append({"model": name, "layer": layer, **row})
        with torch.no_grad():
            exact = feed_forward(up.double(), down.double(), x.double())
            up, down = Fp8Linear(up.float()), Fp8Linear(down.float())
            found.append({"model": name, "layer": "up, GELU, down", "fp8": error(feed_forward(up, down, x), exact)})
    return found


def table(result: dict[str, Any]) -> str:
    """What a person reads."""
    psnr = [
        (task, f"{row['fp32']:.2f}", f"{row['fp8']:.2f}", f"{row['fp8'] - row['fp32']:+.3f}")
        for task, row in result["psnr"].items()
    ]
    losses = [row["fp32"] - row["fp8"] for row in result["psnr"].values()]
    psnr.append(("mean loss", "", "", f"{-sum(losses) / len(losses):+.3f}"))
    errors = [
        (f"{row['model']} {row['layer']}", f"{row['fp8']:.2%}", f"{row['bf16']:.2%}" if "bf16" in row else "")
        for row in result["layers"]
    ]
    return "\n".join(
        [
            f"mini, {result['size']} x {result['size']}, PSNR in dB",
            columns(("task", "float32", "fp8", "change"), psnr),
            "",
            columns(("layer's relative error", "fp8", "bf16"), errors),
            "",
            *told(result),
        ]
    )


if __name__ == "__main__":
    main()
