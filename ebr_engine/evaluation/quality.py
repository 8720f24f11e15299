"""The quality benchmark: a learned prompt against the degraded input, the empty prompt and the naive process."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from torch import Tensor

from ebr_engine.bridge.sampler import flow_table
from ebr_engine.bridge.schedules import FAST_STEPS, power_times
from ebr_engine.engine.restorer import Restorer
from ebr_engine.errors import PromptError
from ebr_engine.evaluation.metrics import psnr, ssim
from ebr_engine.evaluation.photos import NAMES, make_case
from ebr_engine.evaluation.statistics import difference
from ebr_engine.evaluation.tables import Table, table
from ebr_engine.prompts.catalogue import ASSETS, TASKS, fine_file
from ebr_engine.prompts.mixing import evaluations
from ebr_engine.prompts.prompt import load_prompt

ROWS = ("input", "empty prompt", "naive prompt", "EBR prompt")


def measure(
    restorer: Restorer,
    tasks: Sequence[str] = TASKS,
    photos: Sequence[str] = NAMES,
    size: int | None = 256,
    rows: Sequence[str] = ROWS,
    callback: Callable[[dict], None] | None = None,
    prompts: Path | None = None,
    detail: str = "auto",
    deconvolve: str = "auto",
    supersample: int | None = None,
) -> list[dict]:
    """PSNR and SSIM of every row on every photo and task: a list of {task, photo, row, psnr, ssim}.

    All restorations use seed 42 and as many steps as the prompt was learned for, the naive ones five; results are rounded to
    8 bit, as in a file. `prompts`: another folder of learned prompts (`TASK.safetensors`, and `naive/TASK.safetensors`) than the
    bundled one; `fine/TASK.safetensors` goes before the first. `detail`,
    `deconvolve`, `supersample`: see `Restorer.restore`.
    """
    folder = prompts or ASSETS / restorer.backbone.name / "prompts"
    scores = []
    for task in tasks:
        for photo in photos:
            case = make_case(photo, task, size)
            for row in rows:
                result = restore_row(restorer, row, task, case.degraded, folder, detail, deconvolve, supersample)
                result = (result * 255).round() / 255
                record = {"task": task, "photo": photo, "row": row}
                record |= {"psnr": psnr(result, case.clean), "ssim": ssim(result, case.clean)}
                scores.append(record)
                if callback is not None:
                    callback(record)
    return scores


def restore_row(
    restorer: Restorer,
    row: str,
    task: str,
    degraded: Tensor,
    folder: Path,
    detail: str = "auto",
    deconvolve: str = "auto",
    supersample: int | None = None,
) -> Tensor:
    """The degraded picture as one row of the benchmark restores it."""
    if row == "input":
        return degraded
    file = folder / f"{task}.safetensors"
    if row == "naive prompt":
        file = folder / "naive" / f"{task}.safetensors"
    if not file.exists():
        raise PromptError(f"no prompt for the row {row!r}: {file}")
    prompt = load_prompt(file)
    if row == "EBR prompt":  # that of small pictures, where there is one
        fine = None if supersample == 1 else fine_file(file)
        return restorer.restore(degraded, prompt=fine or prompt, detail=detail, deconvolve=deconvolve)
    if row == "empty prompt":  # the same sampler from the same start, nothing learned
        return restorer.restore(degraded, t0=prompt.t0, steps=evaluations([prompt], "fast"))
    steps = flow_table(power_times(FAST_STEPS, prompt.t0), prompt.t0)
    return restorer.run(degraded, restorer.bake([(prompt, 1.0)], steps))


def means(scores: Iterable[dict], value: str = "psnr") -> dict[str, dict[str, float]]:
    """Mean over photos: {task: {row: value}}."""
    collected: dict[str, dict[str, list[float]]] = {}
    for score in scores:
        collected.setdefault(score["task"], {}).setdefault(score["row"], []).append(score[value])
    return {task: {row: sum(v) / len(v) for row, v in rows.items()} for task, rows in collected.items()}


def markdown(scores: Sequence[dict], value: str = "psnr", digits: int = 2) -> str:
    """The table of means, a task a line, with the gain of the EBR prompt over the input."""
    found = means(scores, value)
    rows = list(next(iter(found.values())))
    lines = ["| task | " + " | ".join(rows) + " | gain |", "|---" * (len(rows) + 2) + "|"]
    for task, cells in found.items():
        gain = f"{cells[rows[-1]] - cells[rows[0]]:+.{digits}f}"
        lines.append(f"| {task} | " + " | ".join(f"{cells[row]:.{digits}f}" for row in rows) + f" | {gain} |")
    return "\n".join(lines)


def gain_table(scores: Sequence[dict], value: str = "psnr", digits: int = 2) -> Table:
    """What the EBR prompt gains over every other row, a task a line, with the interval of its mean over the photos."""
    found = {(one["task"], one["photo"], one["row"]): one[value] for one in scores}
    tasks, photos, rows = (list(dict.fromkeys(key[i] for key in found)) for i in range(3))
    lines = []
    for task in tasks:
        pairs = [[(found[task, photo, rows[-1]], found[task, photo, row]) for photo in photos] for row in rows[:-1]]
        gained = [difference(pair, value) for pair in pairs]
        lines.append([task, *(one.text(digits) if one else "" for one in gained)])
    return table(["task", *(f"{rows[-1]} − {row}" for row in rows[:-1])], lines)
