"""`python -m benchmarks.colour_fix`: what giving a restored picture the colours of its input does to `mini`'s results.

The photos and degradations of `ebr-engine eval`, each restored once by its task's prompt (5 steps, seed 42) and corrected in
every way of `media/colour_fix.py`. Told of each: PSNR against the clean photo. `BY_TASK` in that file names, for rain, snow and
blur, the way that is best on average; haze and low light keep none, whatever is measured, because there the input's low
frequencies are the damage; `table` prints what it should say.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import columns, provenance, told, write_json
from ebr_engine.media.colour_fix import BY_TASK, FIXES, NONE, fix_colours

DAMAGED_COLOURS = ("haze", "lowlight")
WORTH = 0.05  # dB that a correction has to gain to be a default


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write everything to a JSON file on request."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.colour_fix", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="side of the photos in pixels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number")
    parser.add_argument("--quick", action="store_true", help="one photo, two tasks, to try the benchmark itself")
    options = parser.parse_args(arguments)
    scores = measure(options.size, options.quick)
    result = {"size": options.size, "scores": scores, "best": best(scores), **provenance()}
    print(table(result))
    if options.json:
        write_json(options.json, result)


def measure(size: int, quick: bool) -> list[dict[str, Any]]:
    """PSNR in dB of every photo, task and way: {task, photo, input, none, wavelet, adain}."""
    import torch

    from ebr_engine.engine.restorer import Restorer
    from ebr_engine.evaluation.metrics import psnr
    from ebr_engine.evaluation.photos import NAMES, make_case
    from ebr_engine.prompts.catalogue import TASKS

    restorer = Restorer("mini", device="cpu", precision="fp32")
    scores = []
    for task in ("haze", "rain") if quick else TASKS:
        plan = restorer.plan(task)
        for photo in NAMES[:1] if quick else NAMES:
            case = make_case(photo, task, size)
            source = case.degraded[0].permute(1, 2, 0).numpy()
            restored = restorer.run(case.degraded, plan)[0].permute(1, 2, 0).numpy()
            record = {"task": task, "photo": photo, "input": psnr(case.degraded, case.clean)}
            for fix in FIXES:
                fixed = torch.from_numpy(fix_colours(restored, source, fix)).permute(2, 0, 1)[None]
                record[fix] = psnr((fixed * 255).round() / 255, case.clean)
            scores.append(record)
    return scores


def means(scores: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean over photos: {task: {way: dB}}."""
    tasks = dict.fromkeys(score["task"] for score in scores)
    rows = {task: [score for score in scores if score["task"] == task] for task in tasks}
    return {task: {way: sum(r[way] for r in found) / len(found) for way in ("input", *FIXES)} for task, found in rows.items()}


def best(scores: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The default that each task should have: none, unless another way gains `WORTH` and the input's colours are no damage."""
    chosen = {}
    for task, row in means(scores).items():
        way = max(FIXES, key=row.__getitem__)
        chosen[task] = way if task not in DAMAGED_COLOURS and row[way] >= row[NONE] + WORTH else NONE
    return chosen


def table(result: dict[str, Any]) -> str:
    """What a person reads."""
    rows = [
        (task, *(f"{row[way]:.2f}" for way in ("input", *FIXES)), result["best"][task], BY_TASK[task])
        for task, row in means(result["scores"]).items()
    ]
    lines = [f"mini, {result['size']} x {result['size']}, PSNR in dB, mean of the photos"]
    lines.append(columns(("task", "input", *FIXES, "best default", "BY_TASK"), rows))
    return "\n".join((*lines, "", *told(result)))


if __name__ == "__main__":
    main()
