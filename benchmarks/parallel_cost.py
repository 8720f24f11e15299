"""`python -m benchmarks.parallel_cost`: bytes that a step sends between devices, and how much faster several may be than one.

Tokens are sharded as `ebr_engine/backbones/sharding.py` does it: a block sends q, k and v and takes back its result, less the
share that stays, and the last layer's output is gathered once. Bytes are checked against a tiny run's collectives by the tests.
Seconds are an estimate and were never measured: one device's are the roofline's floor (the fastest case, in which messages weigh
most); of several, its P-th part, more where tokens do not divide evenly, the passes that lay messages out and back, and the
messages at `SHARE` of the link's rate with nothing computed meanwhile.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpus import GPUS, Gpu
from benchmarks.report import columns, commit, write_json
from benchmarks.roofline import BF16, Workload, step, workload
from ebr_engine.backbones.wan.model import WanConfig

SHARE = 0.7  # of a link's rate that collectives are taken to reach
PASSES = 16  # tensors of a shard's width that are read or written around an exchange: 3 + 3 and 3 + 3 of q, k, v, 2 and 2 back


@dataclass(frozen=True)
class Link:
    """What joins devices: GB/s that each sends, while it receives as many; of which GPU."""

    rate: float
    gpu: str
    source: str


LINKS = {
    "nvlink": Link(450, "h100", "NVLink 4, data sheet"),
    "pcie5": Link(64, "h100", "PCIe 5.0 x16, data sheet"),
    "pcie4": Link(32, "rtx4090", "PCIe 4.0 x16, data sheet"),
}
SIZES = {"wan-14b": (720, 1280, 81), "flux-dev": (2048, 2048, 1)}


def parts_of(work: Workload) -> tuple[int, ...]:
    """Tokens of the parts that are cut by themselves: FLUX's text and picture, Wan's clip."""
    return (work.tokens,) if isinstance(work.config, WanConfig) else (work.text, work.tokens)


def blocks_of(work: Workload) -> int:
    """Self-attentions of a step."""
    return work.config.blocks


def sent(work: Workload, devices: int, element: int = BF16, batch: int = 1) -> int:
    """Bytes that each device sends in a step; `element` bytes a number."""
    shards = [math.ceil(count / devices) for count in parts_of(work)]
    config = work.config
    block = 4 * batch * sum(shards) * config.width * element * (devices - 1) // devices
    out = config.patch_volume * config.out_channels if isinstance(config, WanConfig) else config.in_channels
    return blocks_of(work) * block + batch * shards[-1] * out * element * (devices - 1)


def text_kept_whole(work: Workload, devices: int) -> int:
    """The same, were FLUX's text on every device: its q, k and v are not sent, its result is gathered."""
    image = Workload(work.backbone, work.description, work.config, work.latent, work.tokens, 0)
    gathered = math.ceil(work.config.num_attention_heads / devices) * work.config.head_dim * work.text * BF16 * (devices - 1)
    return sent(image, devices) + blocks_of(work) * gathered


def analyse(work: Workload, devices: int, link: Link, gpu: Gpu) -> dict[str, Any]:
    """Bytes and seconds of a step on so many devices."""
    one = sum(max(op.seconds(gpu, "bf16")) for op in step(work))
    counts = parts_of(work)
    even = devices * sum(math.ceil(count / devices) for count in counts) / sum(counts)
    shard = sum(math.ceil(count / devices) for count in counts)
    passes = PASSES * blocks_of(work) * shard * work.config.width * BF16 / (gpu.bandwidth * 1e12)
    size = sent(work, devices)
    messages = size / (SHARE * link.rate * 1e9)
    several = one * even / devices + passes + messages
    found = {"devices": devices, "bytes": size, "one": one, "computing": one * even / devices, "passes": passes}
    found |= {"messages": messages, "several": several, "faster": one / several, "efficiency": one / several / devices}
    return found | ({} if isinstance(work.config, WanConfig) else {"bytes, text whole": text_kept_whole(work, devices)})


def report(devices: Sequence[int], json: Path | None = None) -> None:
    """Print the estimate of both models over every link, and write it."""
    found = []
    for name, (height, width, frames) in SIZES.items():
        work = workload(name, height, width, frames)
        for kind, link in LINKS.items():
            rows = [analyse(work, count, link, GPUS[link.gpu]) for count in devices]
            found.append({"backbone": name, "size": work.description, "link": kind, **asdict(link), "rows": rows})
            print(f"{name}, {work.description}: {link.gpu}, {link.source}")
            header = ["devices", "GB sent", "s computing", "s passes", "s messages", "times as fast", "efficiency"]
            print(columns(header, [_row(row) for row in rows]), end="\n\n")
    if json:
        write_json(json, {"commit": commit(), "share of the link's rate": SHARE, "measured": False, "workloads": found})


def _row(row: dict[str, Any]) -> list[str]:
    seconds = (f"{row[name]:.3f}" for name in ("computing", "passes", "messages"))
    return [f"{row['devices']}", f"{row['bytes'] / 1e9:.2f}", *seconds, f"{row['faster']:.2f}", f"{row['efficiency']:.2f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write everything to a JSON file on request."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number")
    options = parser.parse_args(arguments)
    if min(options.devices) < 2:
        parser.error("--devices must be 2 or more")
    report(options.devices, options.json)


if __name__ == "__main__":
    main()
