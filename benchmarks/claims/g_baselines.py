"""G. Against what there was before: nothing, a classical method, and a small U-Net trained on the same data for the same time."""

import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.claims import classical
from benchmarks.claims.common import Study, arguments, key_of, study_of
from benchmarks.claims.fitting import pairs
from benchmarks.claims.reporting import command_of, finish
from ebr_engine.media.degradations import degrade
from ebr_engine.prompts.catalogue import TASKS
from ebr_engine.tensor_files import write_tensors
from ebr_engine.training.scenes import ScenePool, still_pool

REFERENCE = "EBR prompt"
RATE = 1e-3


class UNet(nn.Module):
    """Three levels, residual; 0.47 million parameters at width 32. Sides have to be multiples of 4."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.down = nn.ModuleList([_convs(3, width), _convs(width, 2 * width), _convs(2 * width, 4 * width)])
        self.up = nn.ModuleList([_convs(6 * width, 2 * width), _convs(3 * width, width)])
        self.out = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] → the same shape."""
        kept, y = [], x
        for level in self.down:
            y = level(y if not kept else nn.functional.avg_pool2d(y, 2))
            kept.append(y)
        for level, skip in zip(self.up, kept[-2::-1]):
            y = level(torch.cat([nn.functional.interpolate(y, scale_factor=2), skip], dim=1))
        return x + self.out(y)


def _convs(inputs: int, outputs: int) -> nn.Module:
    first, second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())


def train_unet(study: Study, task: str, seed: int, pool: ScenePool, seconds: float) -> tuple[UNet, int]:
    """A U-Net that has been trained on the prompts' data for so many seconds, and how many steps that were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    started, count = time.monotonic(), 0

    def how(clean: Tensor, generator: torch.Generator, depth: Tensor) -> Tensor:
        return degrade(clean, task, generator, depth=depth)

    while (passed := time.monotonic() - started) < seconds or count == 0:
        for group in optimizer.param_groups:
            group["lr"] = RATE * max(0.05, min(1.0, 2 * (1 - passed / seconds)))
        clean, degraded = pairs(pool, study.learning, how, generator)
        (network(degraded) - clean).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        count += 1
    return network.eval(), count


def unets(study: Study) -> dict[tuple[str, int], UNet]:
    """A trained network for every task and seed; kept in `work`, with the number of its steps."""
    found, missing = {}, []
    for task in study.tasks:
        for seed in study.seeds:
            key = key_of(study.settings | {"unet": task, "seed": seed})
            path = study.work / "unets" / f"{key}.safetensors"
            found[task, seed] = path
            if not path.exists():
                missing.append((task, seed, path))
    if missing:
        with still_pool(study.learning.scenes) as pool:
            for task, seed, path in missing:
                seconds = float(study.prompt(task, seed).training["seconds"])
                network, count = train_unet(study, task, seed, pool, max(seconds, 0.1))
                write_tensors(path, network.state_dict(), {"steps": str(count), "seconds": f"{seconds:.1f}"})
    return {key: _load(path) for key, path in found.items()}


def _load(path: Path) -> UNet:
    from safetensors.torch import load_file

    network = UNet()
    network.load_state_dict(load_file(path))
    return network.eval()


def arms(study: Study) -> dict:
    """Every way to restore."""
    trained = cache(lambda: unets(study))
    table = study.ebr_table(study.learning.t0)

    def network(case, seed: int) -> Tensor:
        chosen = trained()[case.task, seed]
        with torch.no_grad():
            return chosen(case.degraded).clamp(0, 1)

    return {
        "input": lambda case, seed: case.degraded,
        "classical": lambda case, seed: classical.METHODS[case.task](case.degraded),
        "U-Net, same data and time": network,
        REFERENCE: lambda case, seed: study.restore(case, study.prompt(case.task, seed), table),
    }


def main(given: Sequence[str] | None = None) -> None:
    """Measure what the store lacks, write the table and the plot."""
    study = study_of("g_baselines", arguments(__doc__).parse_args(given), TASKS)
    rows = study.measure(arms(study))
    notes = [
        "classical: dark channel prior (haze), medians (rain, snow), Wiener with a Gaussian of sigma 2 (blur), gamma (lowlight)",
        "the U-Net has 0.5 million weights of its own; the prompt's frozen backbone was pre-trained, which took its time before",
    ]
    finish(study, "G. Classical methods and a small U-Net", rows, REFERENCE, command_of(__file__, given, sys.argv[1:]), notes)


if __name__ == "__main__":
    main()
