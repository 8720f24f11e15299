"""`python -m benchmarks.readme_picture`: the README's picture, degraded photos above their restorations."""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from ebr_engine import Restorer
from ebr_engine.media.images import read_image, write_image
from ebr_engine.prompts.catalogue import ASSETS

HEIGHT = 300  # pixels of each row


def main() -> None:
    """Restore the demo's photos and write them in two rows to the assets."""
    restorer = Restorer()
    columns = []
    for task in ("haze", "rain", "lowlight"):
        picture = read_image(ASSETS / "demo" / f"{task}.jpg")
        both = np.stack([picture.pixels, restorer.restore(picture.pixels, task=task)])
        width = round(picture.width * HEIGHT / picture.height)
        pair = torch.from_numpy(both).permute(0, 3, 1, 2)
        pair = F.interpolate(pair, (HEIGHT, width), mode="bicubic", antialias=True).clamp(0, 1)
        columns.append(torch.cat(tuple(pair), dim=1))
    rows = torch.cat(columns, dim=2).permute(1, 2, 0).numpy()
    target = Path(ASSETS / "readme.jpg")
    write_image(target, type(picture)(**{**vars(picture), "pixels": rows}), 90)
    print(target)


if __name__ == "__main__":
    main()
