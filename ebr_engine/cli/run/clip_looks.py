"""What is done to and with a restored clip for people's eyes: its colours, and a comparison with its input."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ebr_engine.cli.run.interrupts import Interrupts
from ebr_engine.cli.run.progress import Progress
from ebr_engine.cli.run.recipe import Recipe

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ebr_engine.media.files import Job


def recoloured(restored: "Tensor", clip: "Tensor", recipe: Recipe) -> "np.ndarray":
    """The frames [F, H, W, 3] of a restored chunk [1, 3, F, H, W], with the colours of its input where the recipe asks for it."""
    frames = restored[0].movedim(0, -1).numpy()
    if recipe.colour_fix in (None, "none"):
        return frames

    from ebr_engine.media.colour_fix import fix_colours
    from ebr_engine.media.sizes import resized

    source = resized(clip, *recipe.size) if recipe.size else clip
    return fix_colours(frames, source[0].movedim(0, -1).numpy(), recipe.colour_fix)


def compare(
    job: "Job",
    recipe: Recipe,
    total: int | None,
    progress: Progress,
    interrupts: Interrupts,
    commit: "Callable[[Path, Path], None] | None" = None,
) -> list[str]:
    """Write the input and the finished output of a job as one clip; what of it could not be kept."""
    from ebr_engine.media.compare import compare_clips

    def told(frame: int) -> None:
        interrupts.check()
        progress.share(1, f"comparing, frame {frame}" + (f" of {total}" if total else ""))

    options = recipe.clips
    reading = {"start": options.start, "frames": options.frames, "deinterlace": options.deinterlace}
    writing = {"copy_audio": options.copy_audio, "copy_subtitles": False, "commit": commit}
    return compare_clips(job.source, job.target, job.compare, recipe.compare, reading, writing, told)
