"""Rates of GPUs, which floors are reckoned by."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Rates of a device: dense products in TFLOP/s, memory in TB/s; `fp8` None where it has none."""

    bf16: float
    fp8: float | None
    bandwidth: float
    source: str


GPUS = {
    "h200": Gpu(790, 1350, 4.3, "measured products and copies (the project's design figures)"),
    "h100": Gpu(989, 1979, 3.35, "SXM data sheet"),
    "a100": Gpu(312, None, 2.04, "80 GB SXM data sheet"),
    "rtx4090": Gpu(165, 330, 1.01, "data sheet"),
}
