"""What became of a file, as a line for people and as an object for programs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ebr_engine.media.files import Job
    from ebr_engine.media.holdings import Outcome as HoldingOutcome


@dataclass(frozen=True)
class Outcome:
    """One file: restored, or why not."""

    job: "Job"
    seconds: float = 0.0
    width: int | None = None
    height: int | None = None
    bits: int | None = None
    frames: int | None = None  # of a clip
    note: str = ""  # more to tell of it: what auto chose
    error: str | None = None
    holdings: "tuple[HoldingOutcome, ...]" = ()  # what became of all that the input holds beside its pixels

    @property
    def line(self) -> str:
        """What a person is told of a file that was restored."""
        took = f"{self.seconds:.1f} s"
        if self.frames is not None:
            took = f"{self.frames} frames  {took}  {self.frames / max(self.seconds, 1e-9):.2g} fps"
        note = f"  {self.note}" if self.note else ""
        return f"{self.job.source} -> {self.job.target}  {self.width} x {self.height}  {self.bits} bit  {took}{note}"

    @property
    def reason(self) -> str:
        """The error without the file's name in front."""
        return (self.error or "").removeprefix(f"{self.job.source}: ")

    def as_json(self) -> dict[str, Any]:
        """Names and values, without those that do not apply."""
        values = {
            "input": str(self.job.source),
            "output": None if self.error else str(self.job.target),
            "task": self.job.task,
            "status": "failed" if self.error else "done",
            "seconds": round(self.seconds, 3),
            "width": self.width,
            "height": self.height,
            "bits": self.bits,
            "frames": self.frames,
            "note": self.note or None,
            "holdings": [_listed(each) for each in self.holdings] or None,
            "error": self.error,
        }
        return {name: value for name, value in values.items() if value is not None}


def _listed(outcome: "HoldingOutcome") -> dict[str, Any]:
    held = outcome.holding
    values = {"kind": held.kind, "where": held.where, "detail": held.detail, "bytes": held.size}
    return {**values, "fate": outcome.fate.value, "how": outcome.how}
