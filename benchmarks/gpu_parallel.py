"""The GPU check's section on several devices: a step whose tokens they share, beside the same step on one of them.

Each device has a process of its own, as in `ebr_engine/engine/ranks.py`; on a CPU two processes stand in for them.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

from benchmarks.clock import Run, relative_rms
from benchmarks.models import random_model, work_of
from benchmarks.parallel_cost import sent
from benchmarks.report import ROOT
from ebr_engine.backbones.sharding import WHOLE, Ulysses

ROUNDING = 0.02  # relative RMS of a bf16 step from that on one device
NEEDS, SECONDS = 10, 25  # that a model's processes are expected to take, and may take
MODELS = ("wan-1.3b", "flux-dev")


def parallel(run: Run) -> None:
    """A row a model and number of devices: both steps' times, bytes, and how far the results are apart."""
    count = 2 if run.tiny else torch.cuda.device_count()
    for name in MODELS:
        heads = work_of(name, run.tiny).config.num_attention_heads
        for devices in [size for size in (2, 4, 8) if size <= count and heads % size == 0]:
            about = {"model": name, "devices": devices}
            if run.left(NEEDS, **about):
                with run.guarded(**about):
                    run.add(**about, **measured(run, name, devices))


def measured(run: Run, name: str, devices: int) -> dict[str, Any]:
    """What rank 0 of so many processes finds."""
    store = distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_parallel", json.dumps([name, run.tiny, rank, devices, store.port])],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(devices)
    ]
    try:
        outputs = [process.communicate(timeout=SECONDS * (4 if run.tiny else 1))[0] for process in started]
    finally:
        for process in started:
            process.kill()
    if failed := [rank for rank, process in enumerate(started) if process.returncode]:
        raise RuntimeError(f"rank {failed[0]} of {devices} has failed")
    return json.loads(outputs[0].splitlines()[-1])


@torch.no_grad()
def rank(name: str, tiny: bool, number: int, devices: int, port: int) -> None:
    """One process: the step alone, then shared; rank 0 prints what it found."""
    device = torch.device("cpu") if tiny else torch.device("cuda", number)
    if tiny:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(device)
    store = distributed.TCPStore("127.0.0.1", port, None, False)
    distributed.init_process_group("gloo" if tiny else "nccl", store=store, rank=number, world_size=devices)
    torch.manual_seed(0)
    work = work_of(name, tiny)
    model = random_model(work, device, torch.bfloat16)
    for weight in model.trunk.parameters():  # drawn on each device; all have to be rank 0's
        distributed.broadcast(weight.data, 0)
    backbone, step = model.backbone(), model.bake(torch.tensor([400.0]))[0]
    latent = model.degraded.clone()
    step = type(step)(*(table.contiguous() for table in step))
    for shared in (latent, *step):
        distributed.broadcast(shared, 0)
    results, times = [], []
    for exchange in (WHOLE, Ulysses(number, devices, distributed.group.WORLD.group_name)):
        model.trunk.exchange = exchange
        results.append(backbone.velocity(latent, step))
        times.append(timed(lambda: backbone.velocity(latent, step), device))
    error = relative_rms(*reversed(results))
    found = {
        "ms, one": times[0],
        "ms": times[1],
        "efficiency": times[0] / times[1] / devices,
        "MB sent": sent(work, devices) / 1e6,
    }
    if number == 0:
        print(json.dumps(found | {"RMS from one": error, "ok": error is not None and error <= ROUNDING}), flush=True)
    distributed.barrier()
    distributed.destroy_process_group()


def timed(function: Callable[[], object], device: torch.device, runs: int = 7) -> float:
    """Milliseconds, the median of a number of runs that is the same on every rank."""
    taken = []
    for _ in range(runs + 1):
        distributed.barrier()
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append((time.perf_counter() - started) * 1e3)
    return statistics.median(taken[1:])


if __name__ == "__main__":
    rank(*json.loads(sys.argv[1]))
