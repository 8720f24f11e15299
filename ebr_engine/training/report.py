"""What a run was, how it went, and what came out: `report.md` for a person, `summary.json` for a program."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ebr_engine.evaluation.plots import can_plot, draw_curves
from ebr_engine.evaluation.provenance import joint_hash, prompt_facts, provenance, weights
from ebr_engine.evaluation.run import Row
from ebr_engine.evaluation.summary import as_data, report, write_json
from ebr_engine.prompts.prompt import Prompt
from ebr_engine.training.config import SETTINGS, LearnConfig
from ebr_engine.training.data import PairSamples, Samples
from ebr_engine.training.learner import shareable

LINES = 20  # of the table
CURVES = {"loss": "loss", "psnr": "validation PSNR, dB", "ssim": "validation SSIM"}
METRICS = ("psnr", "ssim")


def facts_of(config: LearnConfig, out: Path, device: str, samples: Samples, log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A run's provenance, as data; `out` is the prompt that it has written."""
    seconds = [row["seconds"] for row in log]
    crops = f"middles of {config.crop[0]}x{config.crop[1]}, {config.frames} frame(s)"
    return {
        "task": config.task,
        "protocol": f"validation: {crops if config.validation else 'procedural scenes'}, 8 bit, RGB",
        "provenance": provenance(device),
        "restoration": {
            "backbone": config.backbone,
            "weights": weights(config.backbone, config.model or None, config.revision or None),
            "prompts": [prompt_facts(out)],
            "schedule": {"name": "fast", "steps": config.steps},
            "precision": config.precision,
            "seeds": [42],
        },
        "started_from": prompt_facts(config.start) if config.start else None,
        "learned_from": _data(config, samples),
        "config": shareable(asdict(config)),
        "iterations": len(log),
        "seconds": round(sum(seconds), 3),
        "seconds_a_step": statistics.median(seconds) if seconds else None,
    }


def _data(config: LearnConfig, samples: Samples) -> dict[str, Any]:
    """How many pairs, and a digest of the list of their names and sizes; or how many scenes of which seed."""
    if not isinstance(samples, PairSamples):
        return {"scenes": config.scenes, "seed": config.seed}
    lines = []
    for pair in samples.pairs:
        sizes = [str(path.stat().st_size) for source in (pair.clean, pair.degraded or ()) for path in source if path.exists()]
        lines.append(" ".join([Path(pair.name).name, *sizes]))
    return {"pairs": len(samples), "skipped": len(samples.bad), "sha256": joint_hash(lines)}


def write_report(
    folder: Path,
    config: LearnConfig,
    log: Sequence[Mapping[str, Any]],
    prompt: Prompt,
    rows: Sequence[Row],
    sheets: Mapping[str, str],
    facts: Mapping[str, Any],
) -> Path:
    """Write `report.md`, `summary.json`, and with matplotlib the curves; the page's path.

    `rows`: of the validation, none where there was nothing to validate on; `sheets`: name → picture in worst/.
    """
    about, step = facts["provenance"], facts["seconds_a_step"]
    lines = [f"# {config.task} on {prompt.base_model or config.backbone}", ""]
    lines += [f"* {len(log)} iterations, {facts['seconds']:.0f} s" + (f", {step:.3g} s a step (median)" if step else "")]
    lines += [f"* {about['processor']} ({about['device']}), torch {about['versions']['torch']}, {about['date']}"]
    lines += [f"* ebr-engine {about['engine']}, commit {about['commit'] or 'unknown'}; all in summary.json", ""]
    if rows:
        lines += report(folder, rows, METRICS, sheets)
    else:
        lines += ["Not validated: there were no pairs to validate on (--validation)."]
    lines += ["", "## Course", ""]
    if can_plot(tell=not rows):  # the sections above have told it
        shown = {label: [row for row in log if name in row] for name, label in CURVES.items()}
        names = {label: name for name, label in CURVES.items()}
        curves = {x: ([row["iteration"] for row in part], [row[names[x]] for row in part]) for x, part in shown.items() if part}
        draw_curves(folder / "curves.png", curves, "iteration")
        lines += ["![Curves](curves.png)", ""]
    lines += [*_course(log), "", *_validations(folder, log)]
    residual, alpha = prompt.residual, prompt.alpha
    lines += ["## Prompt", "", f"* residual {list(residual.shape)}, standard deviation {residual.std():.4g}"]
    lines += [f"* α of {len(alpha)} blocks: {', '.join(f'{value:.3g}' for value in alpha.tolist())}", ""]
    lines += ["## Configuration", "", "| setting | value | meaning |", "|---|---|---|"]
    lines += [f"| {name} | {getattr(config, name)!r} | {one.metadata['help']} |" for name, one in SETTINGS.items()]
    path = folder / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "summary.json", {**facts, **as_data(rows, METRICS)})
    return path


def _validations(folder: Path, log: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the validations on the way told, and the last one's pictures."""
    validated = [row for row in log if "psnr" in row]
    if not validated:
        return []
    best, last = max(validated, key=lambda row: row["psnr"]), validated[-1]
    lines = [f"Validation on the way: {last['psnr']:.2f} dB in the last, {best['psnr']:.2f} dB at best"]
    lines[0] += f" (iteration {best['iteration']}). Degraded, restored, clean:"
    sheets = sorted((folder / "samples").glob(f"{last['iteration']:08d}_*.png"))
    return [*lines, "", *(f"![{sheet.stem}](samples/{sheet.name})" for sheet in sheets), ""]


def _course(log: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of at most `LINES` stretches: the mean loss of each, seconds a step, and the last validation in it."""
    names = [name for name in METRICS if any(name in row for row in log)]
    lines = [
        "| iteration | loss | gradient | s a step | " + "".join(f"{name} | " for name in names),
        "|---" * (4 + len(names)) + "|",
    ]
    length = max(1, -(-len(log) // LINES))
    for start in range(0, len(log), length):
        rows = log[start : start + length]
        means = [sum(row[name] for row in rows) / len(rows) for name in ("loss", "gradient")]
        seconds = statistics.median(row["seconds"] for row in rows)
        found = [next((f"{row[name]:.4g}" for row in reversed(rows) if name in row), "") for name in names]
        cells = [str(rows[-1]["iteration"]), *(f"{mean:.5g}" for mean in means), f"{seconds:.3g}", *found]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
