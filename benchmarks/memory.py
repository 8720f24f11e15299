"""`python -m benchmarks.memory`: the memory model against measured peaks on a CPU.

Every setting is a process of its own. Measured is how far its resident memory rose at most above what it was with the
libraries imported and nothing loaded, so weights count, with a limit set that everything fits into; predicted is what
`engine.memory.peak` computes. `mini` runs as it is; Wan at a middle size with random weights: the architecture at width 512
with 8 blocks, and a VAE of a third of the channels.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, ROOT, columns, provenance, told, write_json

MEASURE = "import sys; from benchmarks.memory import measure; measure(sys.argv[1])"


@dataclass(frozen=True)
class Case:
    """A backbone, in a precision, on pictures or a clip of one size; tile as `Restorer.run` takes it, 0 for none."""

    name: str
    backbone: str
    frames: int
    height: int
    width: int
    precision: str = "fp32"
    tile: int = 0
    blend: str = "latent"


CASES = (
    Case("mini, one piece", "mini", 1, 640, 640),
    Case("mini, one piece, bf16", "mini", 1, 640, 640, "bf16"),
    Case("mini, tiles", "mini", 1, 1024, 1024, tile=256),
    Case("mini, tiles in pixels", "mini", 1, 1280, 1280, tile=256, blend="pixel"),
    Case("mini, 4 frames", "mini", 4, 384, 384),
    Case("wan, 5 frames", "wan", 5, 256, 320),
    Case("wan, 9 frames in tiles", "wan", 9, 256, 384, tile=192),
)


def restorer_of(case: Case) -> Any:
    """The backbone of a case, loaded."""
    from ebr_engine import Restorer

    if case.backbone == "mini":
        return Restorer("mini", precision=case.precision, device="cpu", max_memory="1T")
    import diffusers
    import torch

    from ebr_engine.backbones.base import Backbone
    from ebr_engine.backbones.registry import CONFIGS
    from ebr_engine.backbones.wan.codec import WanCodec
    from ebr_engine.backbones.wan.model import WanConditioner, WanTrunk
    from ebr_engine.engine.fallback import Fitting
    from ebr_engine.engine.run import Engine

    torch.manual_seed(0)
    config = replace(CONFIGS["wan-1.3b"], num_attention_heads=4, num_layers=8, ffn_dim=2048)
    halves = (WanConditioner(config).requires_grad_(False), WanTrunk(config).requires_grad_(False))
    codec = WanCodec(diffusers.AutoencoderKLWan(base_dim=32))
    text = {"context": torch.randn(2, config.text_dim)}
    backbone = Backbone("wan", *halves, codec, text, torch.device("cpu"), torch.float32)
    return Restorer.from_backbone(Engine(backbone, torch.device("cpu"), "none", "off", Fitting(2**40)))


def measure(case: str) -> None:
    """Run a case in this process and print predicted and measured bytes as JSON."""
    import torch

    case = Case(**json.loads(case))
    if case.backbone == "wan":
        import diffusers

        diffusers.AutoencoderKLWan(base_dim=2)
    warm = torch.nn.Linear(64, 64)
    warm(torch.rand(512, 64))
    Path("/proc/self/clear_refs").write_text("5")  # begins to look for the peak anew
    before = _status("VmRSS")
    from ebr_engine.engine.memory import peak

    restorer = restorer_of(case)
    plan = restorer.plan("haze", steps=2) if case.backbone == "mini" else restorer.plan(t0=0.4, steps=2)
    pixels = torch.rand(1, 3, case.frames, case.height, case.width)
    restorer.run(pixels, plan, tile=case.tile, tile_blend=case.blend)
    rungs, work = restorer.engine.rungs(pixels.shape, case.tile, None, case.blend)
    print(json.dumps({"predicted": peak(restorer.engine.costs, rungs[0], work), "measured": _status("VmHWM") - before}))


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def run(case: Case) -> dict[str, Any]:
    """Predicted and measured bytes of a case, from a process of its own."""
    command = [sys.executable, "-c", MEASURE, json.dumps(asdict(case))]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {**asdict(case), **found, "ratio": found["predicted"] / found["measured"]}


def table(results: Sequence[dict[str, Any]]) -> str:
    """What a person reads."""
    rows = [
        (
            result["name"],
            f"{result['frames']} x {result['height']} x {result['width']}",
            f"{result['predicted'] / 1e6:.0f}",
            f"{result['measured'] / 1e6:.0f}",
            f"{result['ratio']:.2f}",
        )
        for result in results
    ]
    return columns(("setting", "pixels", "predicted MB", "measured MB", "ratio"), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write everything to a JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS / "memory_cpu.json", metavar="FILE")
    options = parser.parse_args(arguments)
    results = [run(case) for case in CASES]
    about = provenance()
    print("\n".join([table(results), "", *told(about)]))
    write_json(options.json, {"cases": results, **about})


if __name__ == "__main__":
    main()
