"""What a measurement can be asked for by name: metrics and protocols; imports nothing heavy."""

from dataclasses import dataclass

PROTOCOLS = ("released", "native", "y-channel")
FORMS = ("markdown", "csv", "latex")  # of tables


@dataclass(frozen=True)
class Metric:
    """A score's name, and how it is read."""

    name: str
    title: str
    digits: int
    higher_is_better: bool
    needs_target: bool = True
    unit: str = ""

    @property
    def sign(self) -> int:
        """1 where more is better, else -1."""
        return 1 if self.higher_is_better else -1


METRICS = {
    metric.name: metric
    for metric in (
        Metric("psnr", "PSNR in dB", 2, True, unit="dB"),
        Metric("ssim", "SSIM", 4, True),
        Metric("psnr-y", "PSNR-Y in dB (BasicSR)", 2, True, unit="dB"),
        Metric("psnr-y-full", "PSNR-Y in dB (pyiqa, full range)", 2, True, unit="dB"),
        Metric("lpips", "LPIPS (AlexNet)", 4, False),
        Metric("dists", "DISTS", 4, False),
        Metric("clipiqa+", "CLIP-IQA+", 4, True, needs_target=False),
        Metric("musiq", "MUSIQ", 2, True, needs_target=False),
    )
}
