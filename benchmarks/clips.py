"""`python -m benchmarks.quality clips`: clips on `mini`, frame by frame, and with frames that agree with their neighbours.

Ten clips of photos in motion (`evaluation/moving.py`), degraded as one camera would see it, restored by the bundled prompts. PSNR
and SSIM are means over frames, against the clean frames. *unsteady* is the warping error in 1/255: how much a frame differs from
the one before along the clean clip's motion.
"""

import time
from argparse import ArgumentParser, Namespace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import columns
from ebr_engine.engine.restorer import Restorer
from ebr_engine.evaluation.metrics import psnr, ssim
from ebr_engine.evaluation.moving import CLIPS, Clip, make_clip, warping_error
from ebr_engine.evaluation.statistics import difference
from ebr_engine.media.calm import kept_calm
from ebr_engine.media.motion import agreed
from ebr_engine.prompts.catalogue import TASKS

ALONE = "frame by frame"
WINDOWS = (1, 2, 3, 4)


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--clips", type=int, default=CLIPS, metavar="N")
    parser.add_argument("--frames", type=int, default=9, metavar="N")
    parser.add_argument("--size", type=int, default=192, help="side of the frames in pixels")
    parser.add_argument("--windows", nargs="+", type=int, default=WINDOWS, metavar="N", help="frames on either side")
    parser.add_argument("--quick", action="store_true", help="one short clip, one task, to try the benchmark itself")


def measure(options: Namespace) -> dict[str, Any]:
    """Clips of photos in motion, restored frame by frame and in windows: PSNR, SSIM, steadiness, seconds."""
    torch.manual_seed(0)
    if options.quick:
        options.tasks, options.clips, options.frames, options.size, options.windows = options.tasks[:1], 1, 3, 64, (1,)
    restorer = Restorer("mini", device="cpu", precision="fp32")
    rows = []
    for task in options.tasks:
        plan = restorer.plan(task=task)
        for number in range(options.clips):
            clip = make_clip(number, task, options.size, options.frames)
            rows.append({"row": "input"} | scores(clip, clip.degraded))
            started = time.process_time()
            seen = clip.degraded.transpose(0, 1).contiguous()[None]  # as a file's frames come
            alone = restorer.run(seen, plan, temporal_window=0)[0].movedim(0, -1)  # [F, H, W, 3]
            rows.append({"row": ALONE} | timed(started, clip) | scores(clip, alone.movedim(-1, 1)))
            for window in options.windows:
                started = time.process_time()
                frames = torch.from_numpy(agreed(alone.contiguous().numpy(), window)).movedim(-1, 1)
                if not plan.by_input("auto"):  # as the engine does with any window
                    frames = kept_calm(clip.degraded, frames)
                rows.append({"row": f"window {window}"} | timed(started, clip) | scores(clip, frames))
    return {"size": options.size, "frames": options.frames, "rows": rows}


def timed(started: float, clip: Clip) -> dict[str, float]:
    """Processor time a frame since then."""
    return {"cpu_seconds_a_frame": round((time.process_time() - started) / len(clip.clean), 3)}


def scores(clip: Clip, frames: Tensor) -> dict[str, Any]:
    """What frames [F, 3, H, W] are worth, rounded to 8 bit as a file would be."""
    frames = (frames.clamp(0, 1) * 255).round() / 255
    pairs = list(zip(frames.split(1), clip.clean.split(1)))
    result = {"task": clip.task, "clip": clip.name, "unsteady": warping_error(frames, clip.clean)}
    return result | {"psnr": fmean(psnr(*pair) for pair in pairs), "ssim": fmean(ssim(*pair) for pair in pairs)}


def table(result: dict[str, Any]) -> str:
    """Means over clips, and what a window gains over frame by frame with the 95 % interval of its mean."""
    rows, lines = result["rows"], []
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        alone = {row["clip"]: row["psnr"] for row in mine if row["row"] == ALONE}
        for name in dict.fromkeys(row["row"] for row in mine):
            some = [row for row in mine if row["row"] == name]
            psnr, ssim, unsteady = (fmean(row[value] for row in some) for value in ("psnr", "ssim", "unsteady"))
            gain = difference([(row["psnr"], alone[row["clip"]]) for row in some], "psnr") if "window" in name else None
            seconds = f"{fmean(row['cpu_seconds_a_frame'] for row in some):.2f}" if name != "input" else ""
            line = [task, name, f"{psnr:.2f}", f"{ssim:.3f}", f"{unsteady:.2f}", gain.text(2) if gain else "", seconds]
            lines.append(line)
    return columns(["task", "", "PSNR dB", "SSIM", "unsteady", "gain dB", "CPU s a frame, more"], lines)
