"""`python -m benchmarks.quality steps`: what fewer evaluations cost, by schedule, order and T0.

Real photos, degraded for every task, are restored on `mini` with its learned prompts by each schedule. A row has PSNR against
the clean photo; sharpness, the gradient energy of the result over that of the clean photo (1 is as sharp); and the distance, the
root mean square difference of the latent to the converged solution (200 second-order steps at the same T0 and noise), relative
to that solution's. The released schedule's distance is the yardstick: at the same T0, a schedule that comes as near does the
same work.

Beyond the engine's schedules two experiments run at the prompts' own T0: other powers of the grid t = T0·(1 − i/N)^power, and a
third-order multistep method.
"""

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import columns, figure, mean, save_figure
from ebr_engine.backbones.mini.model import Mini, load_mini
from ebr_engine.backbones.registry import spec
from ebr_engine.bridge.process import start_state
from ebr_engine.bridge.sampler import Velocity, draw_noise, sample, step_table
from ebr_engine.bridge.schedules import FAST_POWER, exact_times, power_times, released_times
from ebr_engine.evaluation.photos import NAMES, make_case
from ebr_engine.prompts.catalogue import ASSETS, TASKS
from ebr_engine.prompts.prompt import Prompt, load_prompt

STEPS = (1, 2, 3, 4, 5, 6, 8, 12, 19)
T0_FACTORS = (0.75, 1.25)  # of the prompt's own T0
T0_STEPS = (1, 2, 4, 5, 8)  # at those
POWERS = (1.25, 1.4, 1.5, 1.55, 1.75, 2.0)
POWER_STEPS = (3, 4, 5)
CONVERGED = 200
SEED = 42


@dataclass(frozen=True)
class Run:
    """One way to restore.

    `schedule`: fast, exact, released (with the timesteps of the scheduler's table, as the authors' code feeds them), or
    `released, 1000 t` (the same times fed as they are, as the other schedules do).
    """

    schedule: str
    steps: int
    order: int
    power: float = FAST_POWER
    t0_factor: float = 1.0

    def times(self, t0: float) -> tuple[float, ...]:
        """The times of a prompt whose own T0 is `t0`, from T0 to 0."""
        t0 = t0 * self.t0_factor
        if self.schedule == "fast":
            return power_times(self.steps, t0, self.power)
        return exact_times(self.steps + 1, t0) if self.schedule == "exact" else released_times(self.steps, t0)


@dataclass(frozen=True)
class Task:
    """A prompt and the photos it restores: clean pixels, the degraded latent and the noise, each [B, ...]."""

    name: str
    prompt: Prompt
    clean: Tensor
    degraded: Tensor
    noise: Tensor


def runs(steps: Sequence[int], t0_factors: Sequence[float], powers: Sequence[float]) -> Iterator[Run]:
    """Everything that is measured: the released schedule, the sweep, and the experiments."""
    yield Run("released", 20, 1)
    yield Run("released, 1000 t", 20, 1)
    yield Run("exact", 19, 1)
    for factor in (1.0, *t0_factors):
        for order in (1, 2):
            yield from (Run("fast", n, order, t0_factor=factor) for n in steps if factor == 1 or n in T0_STEPS)
    few = [n for n in POWER_STEPS if n in steps]
    for order in (2, 3):
        for power in powers if order == 2 else (FAST_POWER, *powers[::2]):
            yield from (Run("fast", n, order, power) for n in few)


def load_task(mini: Mini, name: str, photos: Sequence[str], size: int) -> Task:
    """The cases of the quality benchmark at one size, as a batch."""
    cases = [make_case(photo, name, size) for photo in photos]
    degraded = mini.codec.encode(torch.cat([case.degraded for case in cases]).unsqueeze(2))
    prompt = load_prompt(ASSETS / "mini" / "prompts" / f"{name}.safetensors")
    return Task(name, prompt, torch.cat([case.clean for case in cases]), degraded, draw_noise(degraded.shape, SEED))


@torch.no_grad()
def restore(mini: Mini, task: Task, run: Run) -> Tensor:
    """The restored latent of a run."""
    times, t0 = run.times(task.prompt.t0), task.prompt.t0 * run.t0_factor
    timesteps = spec("wan").released_timesteps(times) if run.schedule == "released" else torch.tensor(times[:-1]) * 1000
    conditioning = mini.conditioner(timesteps, mini.context, [(task.prompt.residual, task.prompt.alpha)])
    if run.order == 3:
        return third_order(mini.trunk, conditioning, task.degraded, task.noise, times, t0)
    return sample(mini.trunk, conditioning, task.degraded, task.noise, step_table(times, t0, run.order))


def moments(t: float, s: float, t0: float) -> tuple[float, float]:
    """What (τ − t) and (τ − t)² in the clean estimate add to the state from t to s: s·∫(1/T0 − 1/τ²)(τ − t)^k dτ."""
    if s == 0:
        return -t, t * t
    log = math.log(s / t)
    return s * (s - t) ** 2 / (2 * t0) - s * log - t + s, s * (s - t) ** 3 / (3 * t0) - s * s + 2 * s * t * log + t * t


def third_order(
    trunk: Velocity, conditioning: Sequence[Any], degraded: Tensor, noise: Tensor, times: Sequence[float], t0: float
) -> Tensor:
    """The multistep method of `bridge.step_table` with a parabola through the last three clean estimates, in Newton's form.

    D(τ) = D_i + m·(τ − t_i) + c·(τ − t_i)(τ − t_{i−1}); the first step is of first order, the second of second.
    """
    state = start_state(degraded, noise, t0)
    known: list[tuple[float, Tensor]] = []  # latest first
    for i, (t, s) in enumerate(zip(times, times[1:])):
        clean = state - t * trunk(state, conditioning[i])
        state = s / t * state + (1 - s / t + s * (s - t) / t0) * clean + s * (t - s) / t0 * degraded
        linear, square = moments(t, s, t0)
        if known:
            (before, last), *older = known
            slope = (clean - last) / (t - before)
            state = state + linear * slope
            if older:
                ((first, oldest),) = older
                curve = (slope - (last - oldest) / (before - first)) / (t - first)
                state = state + (square + (t - before) * linear) * curve
        known = [(t, clean), *known[:1]]
    return state


def gradient_energy(pixels: Tensor) -> Tensor:
    """Mean square of the differences between neighbours, either way, of pictures [B, 3, H, W]: [B]."""
    return sum(pixels.diff(dim=axis).square().flatten(1).mean(1) for axis in (-1, -2))


def scores(mini: Mini, task: Task, latent: Tensor, converged: Tensor) -> dict[str, float]:
    """PSNR in dB, sharpness and distance of a restored latent, means over the photos."""
    pixels = mini.codec.decode(latent).squeeze(2).clamp(0, 1)
    psnr = -10 * (pixels - task.clean).square().flatten(1).mean(1).log10()
    sharpness = gradient_energy(pixels) / gradient_energy(task.clean)
    distance = (latent - converged).flatten(1).norm(dim=1) / converged.flatten(1).norm(dim=1)
    return {"psnr": psnr.mean().item(), "sharpness": sharpness.mean().item(), "distance": distance.mean().item()}


def sweep(mini: Mini, tasks: Iterable[Task], all_runs: Sequence[Run], converged_steps: int) -> list[dict[str, Any]]:
    """A row for every task and run; a run at another T0 is compared with the converged solution of that T0."""
    rows = []
    for task in tasks:
        converged = {
            factor: restore(mini, task, Run("fast", converged_steps, 2, t0_factor=factor))
            for factor in dict.fromkeys(run.t0_factor for run in all_runs)
        }
        for run in all_runs:
            latent = restore(mini, task, run)
            rows.append({"task": task.name, **asdict(run), **scores(mini, task, latent, converged[run.t0_factor])})
        print(f"{task.name}: {len(all_runs)} runs", flush=True)
    return rows


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every run: means over the tasks, and on how many tasks it comes as near as the released schedule."""
    yardstick = {row["task"]: row["distance"] for row in rows if row["schedule"] == "released"}
    groups: dict[Run, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(Run(**{name: row[name] for name in Run.__dataclass_fields__}), []).append(row)
    return [
        asdict(run)
        | {name: mean(group, name) for name in ("psnr", "sharpness", "distance")}
        | {"as_near": sum(row["distance"] <= yardstick[row["task"]] for row in group), "tasks": len(group)}
        for run, group in groups.items()
    ]


def table(result: dict[str, Any]) -> str:
    """What a person reads: the sweep and the experiments, means over all tasks."""
    header = ["schedule", "evaluations", "order", "power", "T0", "PSNR dB", "sharpness", "distance", "as near as released"]
    lines = []
    for row in result["means"]:
        power = f"{row['power']:g}" if row["schedule"] == "fast" else "-"
        numbers = [str(row["steps"]), str(row["order"]), power, f"x{row['t0_factor']:g}"]
        measured = [f"{row['psnr']:.2f}", f"{row['sharpness']:.3f}", f"{row['distance']:.4f}"]
        near = f"{row['as_near']} of {row['tasks']} tasks" if row["t0_factor"] == 1 else "-"
        lines.append([row["schedule"], *numbers, *measured, near])
    size, photos, tasks = result["size"], len(result["photos"]), ", ".join(result["tasks"])
    title = f"mini, float32, {photos} photo(s) of {size} x {size}, tasks {tasks}; distance to {result['converged']} steps"
    return "\n".join([title, "", columns(header, lines)])


def plot(result: dict[str, Any], path: Path) -> None:
    """Distance and PSNR over evaluations at the prompts' own T0, both orders, the released schedule as a line."""
    drawn = figure(13, 4, panels=3)
    own = [row for row in result["means"] if row["t0_factor"] == 1]
    (released,) = (row for row in own if row["schedule"] == "released")
    for panel, name in zip(drawn.axes, ("distance", "psnr", "sharpness")):
        for order in (1, 2):
            line = [row for row in own if row["schedule"] == "fast" and (row["order"], row["power"]) == (order, FAST_POWER)]
            panel.plot([row["steps"] for row in line], [row[name] for row in line], "o-", label=f"order {order}")
        panel.axhline(released[name], color="grey", linestyle="--", label="released, 20")
        panel.set(xlabel="evaluations", title=name, xscale="log")
        panel.set_xticks(result["steps"], [str(n) for n in result["steps"]], minor=False)
        panel.minorticks_off()
    drawn.axes[0].set_yscale("log")
    drawn.axes[0].legend()
    save_figure(drawn, path)


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=128, help="side of the square photos in pixels")
    parser.add_argument("--photos", type=int, default=len(NAMES), help=f"how many of {', '.join(NAMES)}")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--quick", action="store_true", help="a photo of 32 pixels and few steps: does it run?")


def measure(options: Namespace) -> dict[str, Any]:
    """What fewer evaluations cost, by schedule, order and T0."""
    if options.size < 16 or options.size % 8:
        options.error("--size must be a multiple of 8, at least 16")
    if not 1 <= options.photos <= len(NAMES):
        options.error(f"--photos must be 1 to {len(NAMES)}")
    steps, converged = ((1, 2, 3, 4), 24) if options.quick else (STEPS, CONVERGED)
    size, photos = (32, NAMES[:1]) if options.quick else (options.size, NAMES[: options.photos])
    mini = load_mini()
    all_runs = list(runs(steps, T0_FACTORS[:1] if options.quick else T0_FACTORS, POWERS[:1] if options.quick else POWERS))
    rows = sweep(mini, (load_task(mini, name, photos, size) for name in options.tasks), all_runs, converged)
    about = {"size": size, "photos": photos, "tasks": options.tasks, "steps": steps, "converged": converged}
    return about | {"means": means(rows), "rows": rows}
