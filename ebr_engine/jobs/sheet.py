"""One picture restored by every task, on one sheet to choose from: what a command and a server share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from ebr_engine.request import RestoreRequest

SIDE = 512  # to which a larger picture is reduced
FIELDS = ("strength", "steps", "schedule", "seed")  # of a request that a sheet goes by


@dataclass(frozen=True, eq=False)
class Sheet:
    """A sheet: the input, then a tile for each task."""

    pixels: "np.ndarray"  # [H, W, 3] float32 in [0, 1]
    tasks: tuple[str, ...]
    places: tuple[tuple[int, int, int, int], ...]  # left, top, width and height of the tasks' tiles
    diagnosis: Any  # what auto sees: tasks, and their probabilities

    @property
    def chosen(self) -> str:
        """The task that auto would choose; empty for a picture with nothing to repair."""
        return "+".join(self.diagnosis.tasks)


def tasks_of_sheet(backbone: str, named: Sequence[str] = ()) -> list[str]:
    """The tasks that a sheet shows: the named ones, or all that there are prompts for. `EbrError` for one that has none."""
    from ebr_engine.prompts.catalogue import find_prompts, prompt_files

    tasks = list(named) or sorted(prompt_files(backbone), key=_usual)
    for name in tasks or ["haze"]:  # tells how to get prompts where there are none
        find_prompts(backbone, name)
    return tasks


def make_sheet(
    restorer: Any,
    whole: "np.ndarray",
    request: "RestoreRequest",
    named: Sequence[str] = (),
    side: int = SIDE,
    callback: Callable[[float, str], None] | None = None,
) -> Sheet:
    """Restore a picture [H, W, 3], reduced to `side` pixels, by each task; `callback(share, task)` after every step."""
    from ebr_engine.media.sheet import SheetTile, contact_sheet, tile_places

    tasks = tasks_of_sheet(restorer.backbone.name, named)
    pixels, diagnosis = _reduced(whole, side), _diagnosis(restorer, whole)
    chosen = "+".join(diagnosis.tasks)
    if not named and len(diagnosis.tasks) > 1 and set(diagnosis.tasks) <= set(tasks):
        tasks = [*tasks, chosen]
    tiles = [SheetTile(pixels, "input" if chosen else "input · auto sees nothing to repair", not chosen)]
    for index, name in enumerate(tasks):

        def heard(done: int, total: int, index: int = index, name: str = name) -> None:
            if callback is not None:
                callback((index + done / total) / len(tasks), name)

        restored = restorer.restore(pixels, plan=restorer.plan_for(request.with_(task=name)), seed=request.seed, callback=heard)
        tiles.append(SheetTile(restored, _label(name, diagnosis, name == chosen), name == chosen))
    places = tile_places(len(tiles), *pixels.shape[:2])[1:]
    return Sheet(contact_sheet(tiles), tuple(tasks), tuple(places), diagnosis)


def read_whole(source: Path, start: float | None = None) -> "np.ndarray":
    """The pixels [H, W, 3] of a picture, or of a clip's frame at `start` seconds."""
    from ebr_engine.media.images import read_image
    from ebr_engine.media.kinds import is_clip
    from ebr_engine.media.video import open_video

    if not (is_clip(source) or source.is_dir()):
        return read_image(source).pixels
    with open_video(source, start=start, frames=1) as reader:
        return next(iter(reader)).pixels


def sheet_of_file(
    restorer: Any,
    source: Path,
    target: Path,
    request: "RestoreRequest",
    side: int = SIDE,
    callback: Callable[[float, str], None] | None = None,
) -> Sheet:
    """Write the sheet of a file into another, which must be a picture's name. `EbrError` and OSError as of `restore_file`."""
    from ebr_engine.media.images import write_image

    restorer.begin()
    own = request.with_(backbone=restorer.backbone.name)
    sheet = make_sheet(restorer, read_whole(source), own, side=side, callback=callback)
    write_image(target, sheet.pixels)
    return sheet


def _reduced(pixels: "np.ndarray", side: int) -> "np.ndarray":
    from ebr_engine.media.images import resize_picture
    from ebr_engine.media.picture import Picture

    scale = side / max(pixels.shape[:2])
    if scale >= 1:
        return pixels
    return resize_picture(Picture(pixels), *(max(1, round(length * scale)) for length in pixels.shape[:2])).pixels


def _diagnosis(restorer: Any, pixels: "np.ndarray") -> Any:
    import torch

    return restorer.diagnose([torch.tensor(pixels).permute(2, 0, 1)])


def _label(name: str, diagnosis: Any, chosen: bool) -> str:
    known = f" {diagnosis.probability[name]:.0%}" if name in diagnosis.probability else ""
    return f"{name}{known}{' · auto' if chosen else ''}"


def _usual(task: str) -> tuple[int, str]:
    """The tasks that everybody knows first, in their order."""
    from ebr_engine.prompts.catalogue import TASKS

    return (TASKS.index(task) if task in TASKS else len(TASKS), task)
