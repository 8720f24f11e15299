"""Validation PSNR and SSIM against iterations, of learning runs that followed one another: a JSON file to keep.

python -m benchmarks.learning_curves rain=first/rain.run,rain.run haze=haze.run -o learning.json
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

FIELDS = ("iteration", "psnr", "ssim", "loss")
RECENT = 50  # iterations that a point's loss is the mean of


def curve(folder: Path) -> dict:
    """The course of one run: iterations, seconds, and a point a validation."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    points = []
    for i, row in enumerate(rows):
        if "psnr" in row:
            recent = [other["loss"] for other in rows[max(0, i + 1 - RECENT) : i + 1]]
            values = {"iteration": row["iteration"], "psnr": row["psnr"], "ssim": row["ssim"], "loss": sum(recent) / len(recent)}
            points.append({name: round(values[name], 5) for name in FIELDS})
    return {"run": folder.stem, "iterations": len(rows), "seconds": round(sum(row["seconds"] for row in rows)), "points": points}


def main(arguments: Iterable[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="TASK=FOLDER[,FOLDER...]", help="folders that ebr-engine train left, in order")
    parser.add_argument("-o", "--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    curves = {}
    for run in given.runs:
        task, _, folders = run.partition("=")
        if not folders:
            parser.error(f"{run}: write TASK=FOLDER")
        curves[task] = [curve(Path(folder)) for folder in folders.split(",")]
    given.out.write_text(json.dumps(curves, indent=1) + "\n")


if __name__ == "__main__":
    main()
