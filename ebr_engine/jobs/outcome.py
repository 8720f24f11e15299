"""What became of a file, as a line for people and as an object for programs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ebr_engine.jobs.files import Job
    from ebr_engine.media.holdings import Outcome as HoldingOutcome


@dataclass(frozen=True)
class Outcome:
    """One file: restored, left out because nothing was wrong with it, or why not."""

    job: "Job"
    seconds: float = 0.0
    width: int | None = None
    height: int | None = None
    bits: int | None = None
    frames: int | None = None  # of a clip
    note: str = ""  # more to tell of it: what auto chose
    error: str | None = None
    skipped: str | None = None  # why it was left out
    copied: bool = False  # left out, and copied as it is
    holdings: "tuple[HoldingOutcome, ...]" = ()  # what became of all that the input holds beside its pixels
    rate: int | None = None  # of sound: samples a second, channels, and samples of each
    channels: int | None = None
    length: int | None = None

    @property
    def line(self) -> str:
        """What a person is told of a file that did not fail."""
        if self.skipped:
            return f"{self.job.source} {f'-> {self.job.target}  copied' if self.copied else 'skipped'}: {self.skipped}"
        took = f"{self.seconds:.1f} s"
        if self.frames is not None:
            took = f"{self.frames} frames  {took}  {self.frames / max(self.seconds, 1e-9):.2g} fps"
        note = f"  {self.note}" if self.note else ""
        if self.rate:
            channels = {1: "mono", 2: "stereo"}.get(self.channels, f"{self.channels} channels")
            held = f"{self.length / self.rate:.1f} s of sound  {self.rate} Hz  {channels}  {self.bits} bit"
            return f"{self.job.source} -> {self.job.target}  {held}  {took}{note}"
        return f"{self.job.source} -> {self.job.target}  {self.width} x {self.height}  {self.bits} bit  {took}{note}"

    @property
    def reason(self) -> str:
        """The error without the file's name in front."""
        return (self.error or "").removeprefix(f"{self.job.source}: ")

    def as_json(self) -> dict[str, Any]:
        """Names and values, without those that do not apply."""
        status = "failed" if self.error else "skipped" if self.skipped else "done"
        values = {
            "input": str(self.job.source),
            "output": str(self.job.target) if status == "done" or self.copied else None,
            "task": self.job.named_task,
            "status": status,
            "seconds": round(self.seconds, 3),
            "width": self.width,
            "height": self.height,
            "bits": self.bits,
            "frames": self.frames,
            "rate": self.rate,
            "channels": self.channels,
            "samples": self.length,
            "note": self.note or self.skipped,
            "holdings": [_listed(each) for each in self.holdings] or None,
            "error": self.error,
        }
        return {name: value for name, value in values.items() if value is not None}


def _listed(outcome: "HoldingOutcome") -> dict[str, Any]:
    held = outcome.holding
    values = {"kind": held.kind, "where": held.where, "detail": held.detail, "bytes": held.size}
    return {**values, "fate": outcome.fate.value, "how": outcome.how}
