"""The GPU check's last section: pre-training `mini` for the time that is left, as `train-backbone` does it."""

import time
from dataclasses import replace

from benchmarks.clock import Run
from ebr_engine.backbones.mini.model import MINI, load_mini
from ebr_engine.training.pretrain import GPU_BATCH, PretrainConfig, Progress, pretrain

CLOSING = 20  # seconds to leave for the start of processes and the last checkpoint
REPORTS = 12  # rows, at most
TINY = replace(MINI, num_attention_heads=1, attention_head_dim=12, text_dim=16, freq_dim=16, ffn_dim=16, num_layers=1)


def pretraining(run: Run) -> None:
    """Steps for so many minutes: crops a second, losses, and whether the file that is written can be read."""
    minutes = 0.05 if run.tiny else (run.deadline - time.monotonic() - CLOSING) / 60
    config = PretrainConfig(minutes=minutes, batch=GPU_BATCH, save_every=2.0)
    if run.tiny:
        config = replace(config, batch=4, pool=4, sizes=(32, 64), size_odds=(0.5, 0.5), scenes_per_second=1.0, compile=False)
    if not run.left(0 if run.tiny else 40, form="pre-training"):
        return
    told: list[float] = []

    def tell(progress: Progress) -> None:
        if not told or progress.minutes - told[-1] >= minutes / REPORTS or not progress.left:
            told.append(progress.minutes)
            losses = {f"loss at {size}": value for size, value in sorted(progress.losses.items())}
            run.add(
                form="pre-training",
                minutes=progress.minutes,
                step=progress.iteration,
                **{"crops a second": progress.crops_a_second},
                **losses,
            )

    out = run.work / "mini.safetensors"
    pretrain(out, config, False, TINY if run.tiny else MINI, device=run.device.type, ahead=True, tell=tell)
    training = load_mini(out).training
    run.add(
        form="written", iterations=training["iterations"], minutes=training["minutes"], file=str(out), MB=out.stat().st_size / 1e6
    )
