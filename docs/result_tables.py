"""Tables of what was measured and learned, for `make_tables.py`: quality, prompts, claims, backbones."""

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from ebr_engine.evaluation.tables import table
from ebr_engine.prompts.catalogue import ASSETS
from ebr_engine.training.config import SETTINGS, resolve

ROOT = Path(__file__).parents[1]
CLAIMS = (
    "a_space",
    "b_process",
    "c_secretly_knows",
    "d_schedule",
    "e_prompt",
    "f_mixtures",
    "g_baselines",
    "h_adaptive",
)
LEARNED = ("supersample", "t0", "tokens", "iterations", "batch", "size", "learning_rate", "intact", "even", "tone", "stored")
LEARNED += ("heavy", "deconvolve")
LEARNED_OF_SOUND = ("t0", "tokens", "iterations", "batch", "frames", "scenes")
HEADS = {"t0": "T0", "tokens": "tokens a block", "learning_rate": "learning rate", "scenes": "sounds held"}
HEADS |= {"supersample": "finer", "iterations": "iterations", "batch": "crops", "size": "pixels a side", "frames": "frames"}
PLACES = ("start", "photos", "data", "validation")  # settings that name a file or folder of one machine
VALUES = ("psnr", "ssim", "unsteady")  # of a clip
WIDTH = 130  # letters in a line of a command


def quality_scores() -> list[dict[str, Any]]:
    """Every score of `mini` on the photos, as `ebr-engine eval` wrote them."""
    return json.loads((ASSETS / "mini/quality.json").read_text(encoding="utf-8"))["scores"]


def quality_brief() -> str:
    """PSNR of the inputs and of what the prompts restore, a task a column."""
    scores = quality_scores()
    tasks, rows = (list(dict.fromkeys(one[key] for one in scores)) for key in ("task", "row"))
    means = {(one["task"], one["row"]): [] for one in scores}
    for one in scores:
        means[one["task"], one["row"]].append(one["psnr"])
    before, after = ([fmean(means[task, row]) for task in tasks] for row in (rows[0], rows[-1]))
    gains = [new - old for old, new in zip(before, after)]
    lines = [("degraded", before, "{:.2f}"), ("restored", after, "{:.2f}"), ("gain", gains, "{:+.2f}")]
    rows = [(name, *map(form.format, values)) for name, values, form in lines]
    return table(("PSNR in dB", *tasks), rows).markdown()


def quality_table(value: str, digits: int) -> str:
    """Means by task of the input, the empty prompt, the naive prompt and the prompt."""
    from ebr_engine.evaluation.quality import markdown

    return markdown(quality_scores(), value, digits)


def quality_source() -> str:
    """What made the scores, when and where."""
    made = json.loads((ASSETS / "mini/quality.json").read_text(encoding="utf-8"))["provenance"]
    command = " ".join(Path(word).name if word.startswith("/") else word for word in made["command"].split())
    return f"Made by `{command}` on {made['date'][:10]} ({made['processor'].replace('(R)', '')})."


def clean_table() -> str:
    """What a clean photo keeps through each bundled prompt."""
    found = json.loads((ROOT / "benchmarks/results/bundled_mini.json").read_text(encoding="utf-8"))
    kept = {row["task"]: row for row in found["rows"] if not row["strength"]}
    values = [
        (name, *(format(row[value], form) for row in kept.values()))
        for name, value, form in (("PSNR in dB", "psnr", ".1f"), ("SSIM", "ssim", ".3f"))
    ]
    return table(("a clean photo through the prompt of", *kept), values).markdown()


def finer_table() -> str:
    """The same photos through the prompts that see pixels and through those that see them finer, a task and strength a line."""
    found = json.loads((ROOT / "benchmarks/results/supersample.json").read_text(encoding="utf-8"))["rows"]
    lines = []
    for task, strength in dict.fromkeys((row["task"], row["strength"]) for row in found):
        rows = {row["prompt"]: row for row in found if (row["task"], row["strength"]) == (task, strength)}
        shown = (
            f"{rows[way]['psnr']:.2f} / {rows[way]['ssim']:.3f}" if way in rows else "" for way in ("input", "plain", "finer")
        )
        seconds = (f"{rows[way]['seconds']:.2f}" for way in ("plain", "finer"))
        lines.append((task, f"{strength:g}" if strength else "clean", *shown, *seconds))
    return table(("task", "strength", "input", "plain", "finer", "CPU seconds, plain", "finer"), lines).markdown()


def blur_table() -> str:
    """Blurred photos as they are, through blur's prompt alone, deconvolved alone, and through both, a damage a line."""
    found = json.loads((ROOT / "benchmarks/results/blur.json").read_text(encoding="utf-8"))["rows"]
    ways = list(dict.fromkeys(row["way"] for row in found))
    lines = []
    for damage in dict.fromkeys(row["damage"] for row in found):
        rows = {row["way"]: row for row in found if row["damage"] == damage}
        score = "aligned" if damage == "shaken" else "psnr"
        lines.append(
            (damage, *(f"{rows[way][score]:.2f} / {rows[way]['ssim']:.3f}" for way in ways), f"{rows['both']['seconds']:.2f}")
        )
    return table(("damage", *ways, "CPU seconds, both"), lines).markdown()


def bundled(backbone: str) -> dict[str, Any]:
    """The bundled prompts of a backbone by the file's name without its suffix: those of the tasks, and the fine ones."""
    from ebr_engine.backbones.registry import spec
    from ebr_engine.prompts.catalogue import FINE
    from ebr_engine.prompts.prompt import load_prompt

    folder = ASSETS / backbone / "prompts"
    names = [*spec(backbone).tasks, *(f"{FINE}/{task}" for task in spec(backbone).tasks)]
    files = {name: folder / f"{name}.safetensors" for name in names}
    return {name: load_prompt(file) for name, file in files.items() if file.is_file()}


def prompts_table(backbone: str, settings: Sequence[str]) -> str:
    """How each bundled prompt was learned, by its own file."""
    head = ("task", *(HEADS.get(name, f"`{name}`") for name in settings), "mean α", "final loss")
    rows = []
    for task, prompt in bundled(backbone).items():
        told = (shown(prompt.training.get(name, SETTINGS[name].default)) for name in settings)
        loss = prompt.training.get("final_loss")
        rows.append((task, *told, f"{prompt.alpha.mean():.2f}", "" if loss is None else f"{loss:.5f}"))
    return table(head, rows).markdown()


def prompts_commands(backbone: str) -> str:
    """The command of each bundled prompt's last stage of learning: the settings in its file that are not the defaults."""
    lines = []
    for name, prompt in bundled(backbone).items():
        task = prompt.task
        usual = resolve({"task": task, "backbone": backbone})
        own = {key: value for key, value in prompt.training.items() if key in SETTINGS and not SETTINGS[key].metadata["free"]}
        told = [f"-s {key}={shown(value, key)}" for key, value in own.items() if shown(value) != shown(getattr(usual, key))]
        words = [f"ebr-engine train --task {task}", *(["--backbone " + backbone] if backbone != "mini" else []), *told]
        lines.append(wrapped([*words, f"-o {name}.safetensors"]))
        if (share := prompt.training.get("averaged")) is not None:
            start, learned = Path(prompt.training["start"]).name, f"{name}.safetensors"
            lines.append(
                wrapped(["ebr-engine prompts average", start, learned, f"--share {share:g}", f"-o {learned}", "--overwrite"])
            )
    return "\n".join(["```sh", *lines, "```"])


def shown(value: Any, name: str = "") -> str:
    """A setting's value as it is typed; of a path its name alone."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "x".join(map(str, value))
    if name in PLACES:
        return Path(value).name
    return f"{value:g}" if isinstance(value, float) else str(value)


def wrapped(words: Sequence[str]) -> str:
    """A command in lines of about `WIDTH` letters."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) > WIDTH:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".lstrip()
    return " \\\n    ".join(lines)


def clips_table() -> str:
    """Clips as they came, restored frame by frame, and with frames that agree, a task a line."""
    from ebr_engine.evaluation.statistics import difference

    rows = json.loads((ROOT / "benchmarks/results/clips.json").read_text(encoding="utf-8"))["rows"]
    ways = {"input": "input", "frame by frame": "frame by frame", "window 3": "frames agree"}
    head = ("task", *ways.values(), "gain in dB", "unsteady: input", *list(ways.values())[1:])
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        some = {way: [row for row in rows if (row["task"], row["row"]) == (task, way)] for way in ways}
        means = {way: {value: fmean(row[value] for row in found) for value in VALUES} for way, found in some.items()}
        pairs = zip(some["window 3"], some["frame by frame"])
        gain = difference([(after["psnr"], before["psnr"]) for after, before in pairs], "psnr")
        scores = (f"{one['psnr']:.2f} / {one['ssim']:.3f}" for one in means.values())
        lines.append((task, *scores, gain.text(2) if gain else "", *(f"{one['unsteady']:.1f}" for one in means.values())))
    return table(head, lines).markdown()


def claim_table(name: str) -> str:
    """The table of an experiment on the method's claims as it stands in its results, how much it has seen, and its command."""
    lines = (ROOT / f"benchmarks/results/claims/{name}.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("|")]
    seen = next(line for line in lines if line.startswith("* ") and " photos of " in line)
    photos, seeds = re.search(r"(\d+ photos of \d+ x \d+) pixels", seen)[1], re.search(r"\d+ seeds?", seen)[0]
    command = next(line.strip() for line in lines if line.startswith("    python -m "))
    plot = f"[plot](../benchmarks/results/claims/{name}.svg)"
    return "\n".join((*rows, "", f"{photos.replace(' x ', '×')}, {seeds}, {plot}: `{command}`"))


def backbones_table() -> str:
    """Sizes, costs and licences of the backbones, and what has been run of them."""
    import torch

    from ebr_engine.backbones.registry import named_configs

    head = ("model", "`--backbone`", "on the device", "in bf16", "in fp8", "never there", "a step", "licence", "run so far")
    flop, rows = step_flop(), []
    for name, (spec, config) in named_configs().items():
        parts = spec.parameters(config, torch.bfloat16)
        trunk, conditioner = (rounded(parts[f"{half}_parameters"], "B") for half in ("trunk", "conditioner"))
        sizes = (rounded(size, "GB") for size in (parts["trunk_bytes"], fp8_bytes(spec, config)))
        step = f"{flop[name] / 1e12:.3g} TFLOP, {described(spec)}" if name in flop else ""
        rows.append((name, f"`{spec.name}`", trunk, *sizes, conditioner, step, spec.licences.get(name, ""), spec.ran))
    return table(head, rows).markdown()


def rounded(count: int, billions: str) -> str:
    """A number of parameters (`billions` is B) or bytes (GB), with three digits."""
    return f"{count / 1e9:.3g} {billions}" if count >= 1e9 else f"{count / 1e6:.3g} M{billions[1:]}"


def fp8_bytes(spec: Any, config: Any) -> int:
    """Bytes of a trunk in fp8."""
    import torch

    from ebr_engine.backbones.layers import quantize_trunk

    with torch.device("meta"):
        trunk = spec.trunk(config).to(torch.bfloat16)
    quantize_trunk(trunk)
    return sum(tensor.nbytes for tensor in trunk.state_dict().values())


def described(spec: Any) -> str:
    """The size of picture or clip that a backbone's numbers are of."""
    height, width = spec.native_size
    return f"{width}×{height}" + (f", {spec.chunk[0]} frames" if spec.knows_time else "")


def step_flop() -> dict[str, float]:
    """Operations of one step at a backbone's own size with one prompt, by the name of its size."""
    from ebr_engine.backbones.registry import BACKBONES, spec
    from ebr_engine.backbones.views import room_of
    from ebr_engine.engine.restorer import Restorer
    from ebr_engine.prompts.catalogue import prompt_files

    works = json.loads((ROOT / "benchmarks/results/roofline.json").read_text(encoding="utf-8"))["workloads"]
    found = {work["backbone"]: work["totals"]["flop"] for work in works}
    for one in map(spec, BACKBONES):
        if one.bundled:  # it is here, and can be asked
            backbone = (restorer := Restorer(one.name, device="cpu", precision="fp32")).backbone
            plan = restorer.plan(next(iter(prompt_files(one.name))))
            room, config = room_of(backbone.codec, plan.views), backbone.trunk.config
            cells = (side // backbone.codec.spatial + room for side in one.native_size)
            found[next(iter(one.configs))] = one.flop(config, (1, config.latent_channels, 1, *cells), plan.entries[0])
    return found


RESULTS: dict[str, Callable[[], str]] = {
    "backbones": backbones_table,
    "quality": quality_brief,
    "psnr": partial(quality_table, "psnr", 2),
    "ssim": partial(quality_table, "ssim", 3),
    "quality-source": quality_source,
    "clean": clean_table,
    "clips": clips_table,
    "finer": finer_table,
    "blur": blur_table,
    "prompts": partial(prompts_table, "mini", LEARNED),
    "prompt-commands": partial(prompts_commands, "mini"),
    "sound-prompts": partial(prompts_table, "mini-audio", LEARNED_OF_SOUND),
    "sound-prompt-commands": partial(prompts_commands, "mini-audio"),
    **{f"claim-{name[0]}": partial(claim_table, name) for name in CLAIMS},
}
