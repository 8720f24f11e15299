"""Where a run's numbers and pictures go besides its own log: TensorBoard, Weights & Biases."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ebr_engine.errors import EbrError
from ebr_engine.training.config import LearnConfig

NAMES = {"loss": "train/loss", "gradient": "train/gradient", "rate": "train/learning_rate", "seconds": "train/seconds"}
NAMES |= {"psnr": "validation/psnr", "ssim": "validation/ssim"}


def check_installed(config: LearnConfig) -> None:
    """`EbrError` with the install line where a configuration asks for a tracker that is missing."""
    if config.tensorboard and find_spec("tensorboard") is None:
        raise EbrError("tensorboard is not installed: pip install 'ebr-engine[curves]'")
    if config.wandb and find_spec("wandb") is None:
        raise EbrError("wandb is not installed: pip install wandb")


class Trackers:
    """The trackers that a configuration asks for; a context manager."""

    def __init__(self, config: LearnConfig, folder: Path, leads: bool):
        self.board = self.run = None
        if not leads:
            return
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"))
        if config.wandb:
            import wandb

            self.wandb = wandb
            self.run = wandb.init(project=config.wandb, name=folder.stem, dir=str(folder), config=dict(vars(config)))

    def add(self, row: dict[str, Any], sheets: Sequence[Any] = ()) -> None:
        """Numbers of an iteration, and if it was validated the sheets [H, W, 3] in [0, 1]."""
        named = {NAMES[name]: value for name, value in row.items() if name in NAMES}
        validated = "psnr" in row
        if self.board:
            for name, value in named.items():
                self.board.add_scalar(name, value, row["iteration"])
            for i, sheet in enumerate(sheets if validated else ()):
                self.board.add_image(f"validation/{i}", sheet, row["iteration"], dataformats="HWC")
        if self.run:
            images = {f"validation/{i}": self.wandb.Image(sheet) for i, sheet in enumerate(sheets if validated else ())}
            self.run.log(named | images, step=row["iteration"])

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_: object) -> None:
        if self.board:
            self.board.close()
        if self.run:
            self.run.finish()
