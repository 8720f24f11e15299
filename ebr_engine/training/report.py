"""`report.md`: what a run was, how it went, and what came out, for a person."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ebr_engine.prompts.prompt import Prompt
from ebr_engine.training.config import SETTINGS, LearnConfig

ROWS = 20  # of the table
CURVES = {"loss": "loss", "psnr": "validation PSNR, dB", "ssim": "validation SSIM"}


def write_report(folder: Path, config: LearnConfig, log: list[dict[str, Any]], prompt: Prompt) -> Path:
    """Write `report.md` and, with matplotlib, `curves.png`; returns the page's path."""
    lines = [f"# {config.task} on {prompt.base_model or config.backbone}", ""]
    lines += [f"{len(log)} iterations, {sum(row['seconds'] for row in log):.0f} s.", ""]
    if find_spec("matplotlib"):
        _draw(folder / "curves.png", log)
        lines += ["![Curves](curves.png)", ""]
    validated = [row for row in log if "psnr" in row]
    lines += ["## Course", "", *_course(log), ""]
    if validated:
        best = max(validated, key=lambda row: row["psnr"])
        last = validated[-1]
        lines += [
            f"Validation: {last['psnr']:.2f} dB at the end, {best['psnr']:.2f} dB at best (iteration {best['iteration']}).",
            "",
        ]
        sheets = sorted((folder / "samples").glob(f"{last['iteration']:08d}_*.png"))
        lines += ["Degraded, restored, clean:", "", *(f"![{sheet.stem}](samples/{sheet.name})" for sheet in sheets), ""]
    residual, alpha = prompt.residual, prompt.alpha
    lines += ["## Prompt", "", f"* residual {list(residual.shape)}, standard deviation {residual.std():.4g}"]
    lines += [f"* α of {len(alpha)} blocks: {', '.join(f'{value:.3g}' for value in alpha.tolist())}", ""]
    lines += ["## Configuration", "", "| setting | value | meaning |", "|---|---|---|"]
    lines += [f"| {name} | {getattr(config, name)!r} | {one.metadata['help']} |" for name, one in SETTINGS.items()]
    path = folder / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _course(log: list[dict[str, Any]]) -> list[str]:
    """A table of at most `ROWS` stretches: the mean loss of each, and the last validation in it."""
    names = [name for name in ("psnr", "ssim") if any(name in row for row in log)]
    lines = ["| iteration | loss | " + " | ".join(["gradient", *names]) + " |", "|---" * (3 + len(names)) + "|"]
    length = max(1, -(-len(log) // ROWS))
    for start in range(0, len(log), length):
        rows = log[start : start + length]
        means = [sum(row[name] for row in rows) / len(rows) for name in ("loss", "gradient")]
        found = [next((f"{row[name]:.4g}" for row in reversed(rows) if name in row), "") for name in names]
        cells = [str(rows[-1]["iteration"]), *(f"{mean:.5g}" for mean in means), *found]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _draw(path: Path, log: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    shown = {name: label for name, label in CURVES.items() if any(name in row for row in log)}
    figure = Figure(figsize=(5 * len(shown), 3.5), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items()):
        rows = [row for row in log if name in row]
        axes.plot([row["iteration"] for row in rows], [row[name] for row in rows], linewidth=1)
        axes.set_xlabel("iteration")
        axes.set_ylabel(label)
        if name == "loss" and all(row["loss"] > 0 for row in rows):
            axes.set_yscale("log")
    figure.savefig(path, dpi=120)
