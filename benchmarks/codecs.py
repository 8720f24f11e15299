"""`python -m benchmarks.codecs`: the VAEs of Wan 2.1 and FLUX.1 beside diffusers' modules on a CPU, at the published sizes.

Random weights, the same for both. Every measurement is a process of its own that encodes or decodes once, ours and diffusers' in
turns. Times are its processor time, which other programs disturb little. Peaks are its resident memory: all of it, and what came
on top of the libraries (weights count). Results are compared: the largest difference of latents (not normalised) and pixels.
"""

import json
import subprocess
import sys
import time
import zlib
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import report
from benchmarks.full_size import FLUX_VAE
from benchmarks.report import ROOT, Benchmark, columns, spread

SIZES = {"wan": (17, 240, 416), "flux": (1, 512, 512)}  # frames, height, width
BRIEF = {"wan": (5, 48, 64), "flux": (1, 64, 64)}
RUN = "import sys; from benchmarks.codecs import run; run(*sys.argv[1:])"
HALVES, FORMS = ("encode", "decode"), ("ours", "diffusers")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both."""
    report.main("codecs", __doc__, Benchmark(options, measure, table), arguments)


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--codec", choices=tuple(SIZES), action="append", help="one of them only")
    parser.add_argument("--rounds", type=int, default=3, help="of a picture; a clip, which takes minutes, has a third of them")
    parser.add_argument("--quick", action="store_true", help="tiny clips: only shows that it runs")


def measure(options: Namespace) -> dict[str, Any]:
    """Time and memory of both codecs beside diffusers'."""
    rounds = {"flux": options.rounds, "wan": max(1, options.rounds // 3)}
    return {"rows": [row for name in options.codec or rounds for row in compare(name, rounds[name], options.quick)]}


def compare(name: str, rounds: int, quick: bool) -> list[dict[str, Any]]:
    """A row for encoding and one for decoding."""
    clip = (BRIEF if quick else SIZES)[name]
    rows = []
    for half in HALVES:
        found: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMS}
        with TemporaryDirectory() as folder:
            for _ in range(rounds):
                for form in FORMS:
                    found[form].append(in_process(form, name, half, clip, Path(folder, form)))
            made = [torch.load(Path(folder, form)) for form in FORMS]
        row = {"codec": name, "half": half, "clip": clip, "difference": (made[0] - made[1]).abs().max().item()}
        for measured in ("seconds", "whole", "beyond libraries", "weights"):
            row[measured] = {form: spread([one[measured] for one in found[form]]) for form in FORMS}
        rows.append(row)
        print(*row_of(row), sep="  ", file=sys.stderr)
    return rows


def diffusers_vae(name: str) -> nn.Module:
    """diffusers' module of the published sizes, freshly initialised."""
    import diffusers

    torch.manual_seed(0)
    return (diffusers.AutoencoderKL(**FLUX_VAE) if name == "flux" else diffusers.AutoencoderKLWan()).eval()


def our_codec(name: str) -> Any:
    """Ours of the same sizes."""
    from ebr_engine.backbones.registry import spec

    kind = spec(name).codec
    torch.manual_seed(0)
    return kind(kind.network(kind.sizes(**(FLUX_VAE if name == "flux" else {}))))


def given(name: str, half: str, clip: Sequence[int]) -> Tensor:
    """Pixels in [0, 1], or a latent that is not normalised."""
    frames, height, width = clip
    torch.manual_seed(1)
    if half == "encode":
        return torch.rand(1, 3, frames, height, width)
    return torch.randn(1, 16, 1 + (frames - 1) // 4, height // 8, width // 8)


@torch.no_grad()
def same_weights(network: nn.Module) -> None:
    """Random weights that depend on their names alone, of the size that torch gives fresh ones."""
    for name, weight in network.state_dict().items():
        if weight.dim() > 1 and "norm" not in name:
            torch.manual_seed(zlib.crc32(name.encode()))
            bound = weight[0].numel() ** -0.5
            weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound))
        elif name.endswith("bias"):
            weight.zero_()


@torch.no_grad()
def coded(codec: Any, half: str, x: Tensor) -> Tensor:
    """The latent, not normalised, or pixels in [-1, 1] as diffusers clamps a clip's."""
    if not isinstance(codec, nn.Module):  # ours, whose latents are normalised and whose pixels are in [0, 1]
        if half == "encode":
            return codec.encode(x) * codec.std + codec.mean
        return codec.decode((x - codec.mean) / codec.std).mul_(2).sub_(1).clamp_(-1, 1)
    x = x if type(codec).__name__ == "AutoencoderKLWan" else x.squeeze(2)
    y = codec.encode(x * 2 - 1).latent_dist.mode() if half == "encode" else codec.decode(x).sample.clamp_(-1, 1)
    return y if y.dim() == 5 else y.unsqueeze(2)


def run(form: str, name: str, half: str, clip: str, out: str) -> None:
    """Do one thing in this process, write its result, and print what it took as JSON."""
    torch.nn.Linear(64, 64)(torch.rand(512, 64))
    if form == "ours":
        import ebr_engine.backbones.registry
        import ebr_engine.kernels.backend

        ebr_engine.kernels.backend.native(torch.rand(1))
    else:
        import diffusers

        _ = diffusers.AutoencoderKLWan, diffusers.AutoencoderKL  # imported when they are asked for
    before = _status("VmRSS")
    codec = our_codec(name) if form == "ours" else diffusers_vae(name)
    network = codec.vae if form == "ours" else codec
    same_weights(network)
    x, loaded = given(name, half, json.loads(clip)), _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # begins to look for the peak anew
    started = time.process_time()
    result = coded(codec, half, x)
    seconds, whole = time.process_time() - started, _status("VmHWM")
    torch.save(result, out)
    print(json.dumps({"seconds": seconds, "whole": whole, "beyond libraries": whole - before, "weights": loaded - before}))


def in_process(form: str, name: str, half: str, clip: Sequence[int], out: Path) -> dict[str, float]:
    """What a process of its own took, whose result is written to `out`."""
    command = [sys.executable, "-c", RUN, form, name, half, json.dumps(clip), str(out)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def row_of(row: dict[str, Any]) -> list[str]:
    """What a person reads of a row."""
    ours, theirs = (row["seconds"][form]["median"] for form in FORMS)
    whole, beyond = ([row[key][form]["median"] for form in FORMS] for key in ("whole", "beyond libraries"))
    frames, height, width = row["clip"]
    return [
        f"{row['codec']} {row['half']}, {frames} × {height} × {width}",
        f"{ours:.1f}",
        f"{theirs:.1f}",
        f"{theirs / ours:.2f}",
        *(f"{one / 2**20:.0f}" for one in whole),
        f"{whole[0] / whole[1]:.2f}",
        f"{beyond[0] / beyond[1]:.2f}",
        f"{row['difference']:.1e}",
    ]


def table(result: dict[str, Any]) -> str:
    """What a person reads."""
    header = ("", "ours, s", "diffusers, s", "gain", "ours, MiB", "diffusers, MiB", "share", "beyond libraries", "difference")
    return columns(header, [row_of(row) for row in result["rows"]])


if __name__ == "__main__":
    main()
