"""Pictures of a few files: input, results and target side by side, at a size that can be looked at."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from ebr_engine.errors import EbrError
from ebr_engine.evaluation.paired import Item
from ebr_engine.evaluation.run import Measurer
from ebr_engine.media.images import write_image
from ebr_engine.media.sheet import SheetTile, contact_sheet

LEAST, MOST = 256, 640  # pixels of a picture's width and of its longer side


def readable(picture: Tensor) -> np.ndarray:
    """A picture [3, H, W] as pixels [h, w, 3], a small one with its pixels repeated, a large one averaged down."""
    height, width = picture.shape[-2:]
    if width < LEAST:
        grown = picture.repeat_interleave(times := math.ceil(LEAST / width), -1).repeat_interleave(times, -2)
    elif (scale := MOST / max(height, width)) < 1:
        size = max(1, round(height * scale)), max(1, round(width * scale))
        grown = F.interpolate(picture[None].float(), size, mode="area")[0]
    else:
        grown = picture
    return grown.float().clamp(0, 1).permute(1, 2, 0).numpy()


def sheet(frames: Mapping[str, Tensor]) -> np.ndarray:
    """Pictures [3, H, W] of one size by their label, side by side: [h, w, 3]."""
    return np.concatenate([contact_sheet([SheetTile(readable(picture), label)]) for label, picture in frames.items()], axis=1)


def write_sheets(
    folder: Path, items: Sequence[Item], names: Sequence[str], settings: Any, measurer: Callable[[], Measurer]
) -> dict[str, str]:
    """Sheets of the items `names` in `folder`; name → file name. Those of an earlier run with the same `settings` and files stay.

    What is not wanted any more is removed. A file that cannot be read again is left out.
    """
    known = {item.name: item for item in items}
    files = {name: _file_name(known[name], settings) for name in names}
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        if old.name not in files.values():
            old.unlink()
    for name, file in list(files.items()):
        if not (folder / file).exists():
            try:
                write_image(folder / file, sheet(measurer().first_frames(known[name])))
            except (EbrError, OSError):
                del files[name]
    return files


def _file_name(item: Item, settings: Any) -> str:
    digest = hashlib.sha256(json.dumps([settings, item.name, item.stamp()], default=str).encode()).hexdigest()
    return f"{re.sub('[^A-Za-z0-9_-]+', '_', item.name)[-60:]}-{digest[:10]}.png"
