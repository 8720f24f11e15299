"""G. Against what there was before: nothing, a classical method, and U-Nets trained on the same data for the same time.

One U-Net has as many weights as the prompt has numbers, one as many as the frozen transformer, and one lies between them, as one
would build it for so little time.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.claims import classical
from benchmarks.claims.common import Study, broad_arguments, fingerprint, key_of, study_of
from benchmarks.claims.learning import config_of, kept_pool
from benchmarks.claims.reporting import command_of, finish
from ebr_engine.evaluation.photos import Case
from ebr_engine.prompts.catalogue import TASKS
from ebr_engine.tensor_files import write_tensors
from ebr_engine.training.data import SceneSamples
from ebr_engine.training.scenes import ScenePool

REFERENCE = "EBR prompt"
RATE = 1e-3
SIZE = 256  # pixels a side of the photos: what the baselines are for has no smaller sizes to save time
WIDTHS = {3: "4 thousand weights", 32: "0.5 million weights", 125: "7 million weights"}


class UNet(nn.Module):
    """Three levels, residual. Sides have to be multiples of 4."""

    def __init__(self, width: int):
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


def train_unet(study: Study, width: int, task: str, seed: int, pool: ScenePool, seconds: float) -> tuple[UNet, int]:
    """A U-Net trained on the prompts' data for so many seconds of processor time, and how many steps that were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet(width)
    samples, batch = SceneSamples(config_of(study, task, seed), pool), study.learning.batch
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    started, count = time.process_time(), 0

    while (passed := time.process_time() - started) < seconds or count == 0:
        for group in optimizer.param_groups:
            group["lr"] = RATE * max(0.05, min(1.0, 2 * (1 - passed / seconds)))
        pairs = zip(*(samples.pixels(number) for number in range(count * batch, (count + 1) * batch)))
        degraded, clean = (torch.cat(part, 1).movedim(1, 0) for part in pairs)  # [3, 1, h, w] each
        (network(degraded) - clean).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        count += 1
    return network.eval(), count


def unet(study: Study, width: int, task: str, seed: int) -> tuple[UNet, int]:
    """A trained network, and the number of its steps; kept in `work`."""
    chosen = asdict(study.learning) | {"unet": task, "width": width, "seed": seed, "model": fingerprint(study.model)}
    path = study.work / "unets" / f"{key_of(chosen)}.safetensors"
    if not path.exists():
        seconds = max(float(study.prompt(task, seed).training["seconds"]), 0.1)
        network, count = train_unet(study, width, task, seed, kept_pool(study.learning.scenes, study.work), seconds)
        write_tensors(path, network.state_dict(), {"steps": str(count), "seconds": f"{seconds:.1f}"})
    network = UNet(width)
    network.load_state_dict(load_file(path))
    with safe_open(path, "pt") as file:
        return network.eval(), int(file.metadata()["steps"])


def arms(study: Study) -> dict:
    """Every way to restore."""
    table = study.ebr_table(study.learning.t0)

    def network(width: int):
        def restored(case: Case, seed: int) -> Tensor:
            chosen, _ = unet(study, width, case.task, seed)
            with torch.no_grad():
                return chosen(case.degraded).clamp(0, 1)

        return restored

    return {
        "input": lambda case, seed: case.degraded,
        "classical": lambda case, seed: classical.METHODS[case.task](case.degraded),
        **{f"U-Net, {name}": network(width) for width, name in WIDTHS.items()},
        REFERENCE: lambda case, seed: study.restore(case, study.prompt(case.task, seed), table),
    }


def told_steps(study: Study) -> str:
    """How many steps the networks had in their time."""
    found = {
        name: [unet(study, width, task, seed)[1] for task in study.tasks for seed in study.seeds]
        for width, name in WIDTHS.items()
    }
    return ", ".join(f"{name} {fmean(steps):.0f}" for name, steps in found.items())


def main(given: Sequence[str] | None = None) -> None:
    """Measure what the store lacks, write the table and the plot."""
    study = study_of("g_baselines", broad_arguments(__doc__, size=SIZE).parse_args(given), TASKS)
    rows = study.measure(arms(study))
    notes = [
        "classical: dark channel prior (haze), medians (rain, snow), Wiener with a Gaussian of sigma 2 (blur), gamma (lowlight)",
        "U-Nets learn from the same crops, as many at a time, for as much processor time as the prompt of the task and seed; "
        f"steps in the mean: {told_steps(study)}; the prompt's {study.learning.iterations}",
        "the prompt has 4102 numbers; its frozen backbone, 7 million, was pre-trained, which took its time before",
    ]
    finish(study, "G. Classical methods and U-Nets", rows, REFERENCE, command_of(__file__, given, sys.argv[1:]), notes)


if __name__ == "__main__":
    main()
