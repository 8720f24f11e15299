"""How fast the engine runs here: stages of a restoration by the clock, and the operations of its transformer."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ebr_engine.engine.restorer import Restorer
    from ebr_engine.engine.run import Engine

TRIAL = 0.02  # of the operations that are estimated: what a trial may take
SMALLEST_TRIAL = 8  # tokens a side: less says nothing of a large picture
STAGES = ("bake", "encode", "denoise", "decode")


@contextmanager
def watched(restorer: "Restorer") -> Iterator[dict[str, list[float]]]:
    """Meanwhile, seconds of every encoding, denoising (a whole run) and decoding, and the operations of each denoising.

    They are found under `encode`, `denoise`, `decode` and `flop`; a CUDA device is waited for.
    """
    seconds: dict[str, list[float]] = {"encode": [], "denoise": [], "decode": [], "flop": []}

    def clocked(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Any, **settings: Any) -> Tensor:
            synchronise(restorer.device)
            started = time.perf_counter()
            result = function(*arguments, **settings)
            synchronise(restorer.device)
            seconds[name].append(time.perf_counter() - started)
            if name == "denoise":
                plan, latent = arguments[:2]
                seconds["flop"].append(plan_flop(restorer, plan, latent))
            return result

        return call

    places = {"encode": restorer.codec, "decode": restorer.codec, "denoise": restorer.runner}
    for name, owner in places.items():
        method = "run" if name == "denoise" else name
        setattr(owner, method, clocked(name, getattr(owner, method)))
    try:
        yield seconds
    finally:
        for name, owner in places.items():
            delattr(owner, "run" if name == "denoise" else name)


def plan_flop(restorer: "Restorer", plan: Any, latent: Tensor) -> int:
    """Operations of a run of `plan` on `latent` in one piece."""
    flop, config = restorer.backbone.spec.flop, restorer.trunk.config
    return sum(flop(config, latent.shape, tables[0]) for tables in plan.tables) * len(plan.table)


def estimate(engine: "Engine", evaluations: Counter[tuple[int, int]], step: Any) -> float | None:
    """Seconds that evaluations of the transformer will take, by the size of their latents (height, width), on a CPU.

    Two evaluations of a smaller square are timed, the first of which warms up; None where they would be no small part of the
    whole, on a GPU, whose first run takes longest, and where several devices share the work. `step`: any of the tables.
    """
    if engine.backbone.device.type != "cpu" or engine.ranks or not evaluations:
        return None
    channels, flop, config = engine.backbone.codec.channels, engine.backbone.spec.flop, engine.backbone.trunk.config

    def operations(cells: tuple[int, int]) -> int:
        return flop(config, (1, channels, 1, *cells), step)

    total = sum(count * operations(cells) for cells, count in evaluations.items())
    patch, side = engine.backbone.patch, max(max(cells) for cells in evaluations)
    while 2 * operations((side, side)) > TRIAL * total:
        side = side // 2 // patch * patch
        if side < SMALLEST_TRIAL * patch:
            return None
    engine.runner.pack()
    latent = torch.zeros(1, channels, 1, side, side)
    taken = []
    for _ in range(2):
        started = time.perf_counter()
        engine.backbone.velocity(latent, step)
        taken.append(time.perf_counter() - started)
    return min(taken) * total / operations((side, side))


def synchronise(device: torch.device) -> None:
    """Wait for a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured(restorer: "Restorer", task: str, size: int, runs: int, batch: int = 1) -> dict[str, Any]:
    """Median seconds of the stages of restoring `batch` square pictures, or chunks of sound, in one run.

    They come after a first run that stands by itself. `bake` is that of the tables, which all share; `whole` is a run without it;
    TFLOP/s are the transformer's.
    """
    started = time.perf_counter()
    plan = restorer.plan(task)
    synchronise(restorer.device)
    bake = time.perf_counter() - started
    spec = restorer.backbone.spec
    shape = (spec.chunk[0], *spec.side) if spec.side else (size, size)
    pixels = torch.rand(batch, spec.colours, *shape, generator=torch.Generator().manual_seed(0))
    whole = []
    with watched(restorer) as seconds:
        for _ in range(runs + 1):
            started = time.perf_counter()
            restorer.run(pixels, plan, tile=0)
            whole.append(time.perf_counter() - started)
    stages = {name: median(seconds[name][1:]) for name in ("encode", "denoise", "decode")}
    rate = median(flop / taken / 1e12 for flop, taken in zip(seconds["flop"][1:], seconds["denoise"][1:]))
    return {"bake": bake, "first": whole[0], "whole": median(whole[1:]), **stages, "steps": len(plan.table), "tflops": rate}
