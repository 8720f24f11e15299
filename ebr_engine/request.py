"""What can be asked for when files are restored: every option once, with its default, its choices and its help.

The command's options, the keyword arguments of `Restorer`, the columns of a manifest, a journal's digest and a server's JSON
are all made from the fields of `RestoreRequest`. Nothing heavy is imported here.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from ebr_engine.bridge.schedules import SCHEDULES
from ebr_engine.errors import EbrError, EngineError, check_choice

PRECISIONS = ("auto", "bf16", "fp16", "fp32", "fp8", "int8")
OFFLOADS = ("none", "codec", "blocks")
COMPILES = ("auto", "off", "on")
BLENDS = ("latent", "pixel")
MIXES = ("auto", "residual", "velocity", "turn")
SIZES = ("native", "released")
COLOUR_FIXES = ("none", "wavelet", "adain")
COMPARES = ("side", "wipe")
DETAILS = ("auto", "model", "input")
DECONVOLVES = ("auto", "off", "on")

LOAD, PLAN, RUN, CLIP, FILE = "load", "plan", "run", "clip", "file"  # the stage that reads a field


def _ask(stage: str, panel: str, default: Any, option: str, help: str, **more: Any) -> Any:
    """A field; `option` is its flags and metavar as a help page shows them, in `panel`.

    `more`: `choices`; `span` (least, most), both allowed, or neither where it is `open`; `shown`, the default in words; `free`,
    where it changes nothing in what is written; `by_file`, where a manifest may name it for each file; `switch`, a flag that
    means one of its values, which the option may `refine`.
    """
    flags = tuple(part for part in option.split(" ") if part.startswith("-"))
    about = {"flags": flags, "metavar": option.rpartition(" ")[2] if not option.split(" ")[-1].startswith("-") else None}
    return field(default=default, metadata={"stage": stage, "panel": panel, "help": help, **about, **more})


_repair = partial(_ask, PLAN, "What to repair", by_file=True)
_seen = partial(_ask, FILE, "What to repair")
_file = partial(_ask, FILE, "Files")
_clip = partial(_ask, CLIP, "Clips")
_sampling = partial(_ask, PLAN, "Sampling", by_file=True)
_model = partial(_ask, LOAD, "Model")
_computing = partial(_ask, LOAD, "Computing")
_tiling = partial(_ask, RUN, "Computing")
AT_LEAST_0, AT_LEAST_1 = (0, math.inf), (1, math.inf)


@dataclass(frozen=True)
class RestoreRequest:
    """How files are restored: a frozen object, equal to another that asks for the same.

    Raises `EbrError`, in one line, for a value that no run can have.
    """

    task: str | None = _repair(
        None,
        "--task -t NAME",
        "A bundled or installed prompt, such as haze; several: rain:0.7+haze:0.3; auto looks at each.",
    )
    prompt: tuple[tuple[Any, float], ...] = _repair(
        (), "--prompt -p FILE[:WEIGHT]...", "Prompt files in place of a task; weight 1 if none is given."
    )
    mix: str = _repair(
        "auto",
        "--mix",
        "Several prompts: add their residuals (one run), average velocities, or restore in turn; auto: turn for mini.",
        choices=MIXES,
    )
    strength: float = _repair(1.0, "--strength X", "Of the prompts: 1 as learned, 0 none, at most 2.", span=(0, 2))
    detail: str = _ask(
        RUN,
        "What to repair",
        "auto",
        "--detail",
        "input: the model gives tones only, by one run on a small version without tiles, and the detail is the input's, as haze "
        "and low light allow; auto: what the prompt says.",
        choices=DETAILS,
        by_file=True,
    )
    deconvolve: str = _ask(
        RUN,
        "What to repair",
        "auto",
        "--deconvolve",
        "on: find how a picture is blurred, in the picture itself, and take that out before the model sees it; auto: what the "
        "prompt says, as that of blur does.",
        choices=DECONVOLVES,
        by_file=True,
    )
    supersample: int | None = _repair(
        None,
        "--supersample N",
        "How many times finer than its pixels the model sees a picture, where the task has a prompt for that: 2 restores haze, "
        "rain and snow better, in five to seven times the time.",
        span=(1, 2),
        shown="2 for pictures of up to a megapixel (haze: of sides up to 512), else 1",
    )
    guess: bool = _seen(False, "--guess", "With --task auto: take the likeliest task where none is sure.")
    copy_clean: bool = _seen(False, "--copy-clean", "With --task auto: copy what needs no repair, as it is.")
    color_fix: str | None = _seen(
        None,
        "--color-fix",
        "Give results the input's colours; never right for haze or low light.",
        choices=COLOUR_FIXES,
        shown="by task",
        by_file=True,
    )

    quality: int | None = _file(
        None,
        "--quality N",
        "Of JPEG, WebP and AVIF outputs.",
        span=(1, 100),
        shown="a JPEG's own; lossless if the input is; else 95",
        by_file=True,
    )
    strict: bool = _file(False, "--strict", "A file fails where its output does not keep all that it holds.", free=True)
    compare: str | None = _file(
        None,
        "--compare-as",
        "How: side by side, or with a line that wipes from one to the other.",
        choices=COMPARES,
        shown="side",
        switch=("--compare", "side", "Also write NAME_compare: input beside output, of pictures and of clips."),
        refines=True,
    )

    start: float | None = _clip(None, "--start SECONDS", "Begin there.", span=AT_LEAST_0, by_file=True)
    frames: int | None = _clip(None, "--frames N", "Restore so many frames only.", span=AT_LEAST_1, by_file=True)
    chunk_frames: int | None = _clip(
        None, "--chunk-frames N", "Frames that are restored together.", span=AT_LEAST_1, shown="by backbone"
    )
    chunk_overlap: int | None = _clip(
        None, "--chunk-overlap N", "Frames over which they fade into each other.", span=AT_LEAST_0, shown="by backbone"
    )
    temporal_window: int | None = _ask(
        RUN,
        "Clips",
        None,
        "--temporal-window N",
        "Where a clip is restored frame by frame: frames on either side with which each then agrees, along the motion; 0: none.",
        span=(0, 16),
        shown="3 for mini, where OpenCV is installed",
        by_file=True,
    )
    as_clip: bool = _clip(False, "--as-clip", "The folder's pictures are the frames of one clip.")
    fps: float = _clip(24, "--fps X", "Of a folder of frames without a timestamps.txt.", span=(0.01, math.inf), by_file=True)
    per_frame: bool = _clip(False, "--per-frame", "Restore a clip frame by frame with flux, which knows no time.")
    deinterlace: bool = _clip(False, "--deinterlace", "Make whole frames of an interlaced clip.")
    codec: str | None = _clip(
        None, "--codec -c NAME", "FFmpeg's encoder.", shown="an editor's or archive's own; else H.264, HEVC above 8 bit"
    )
    pix_fmt: str | None = _clip(None, "--pix-fmt NAME", "Stored format.", shown="by codec and source")
    crf: float | None = _clip(None, "--crf X", "Quality; lower is better.", span=AT_LEAST_0, shown="by codec")
    encoder: tuple[str, ...] = _clip((), "-e KEY=VALUE...", "More options of the encoder.")
    copy_audio: bool = _clip(True, "--copy-audio/--no-copy-audio", "Keep the sound, untouched.")
    copy_subtitles: bool = _clip(True, "--copy-subtitles/--no-copy-subtitles", "Keep the subtitles, untouched.")

    steps: int | None = _sampling(
        None, "--steps N", "Runs of the transformer per picture.", span=AT_LEAST_1, shown="by prompt and schedule"
    )
    schedule: str = _sampling(
        "fast", "--schedule", "How the steps are spread; released is what the paper's code does.", choices=tuple(SCHEDULES)
    )
    order: int | None = _sampling(None, "--order N", "Order of the solver.", span=(1, 2), shown="by schedule")
    t0: float | None = _sampling(
        None,
        "--t0 X",
        "Noise at the start, between 0 and 1: more changes more.",
        span=(0, 1),
        open=True,
        shown="the prompt's",
    )
    seed: int = _ask(RUN, "Sampling", 42, "--seed N", "Seed of the noise.", span=AT_LEAST_0, by_file=True)
    size: str = _ask(
        FILE,
        "Sampling",
        "native",
        "--size",
        "released: the published protocol's fixed size, 480x832 (wan) or 1024x1024 (flux).",
        choices=SIZES,
    )

    backbone: str = _model("mini", "--backbone -b NAME", "The frozen transformer: mini, wan, flux or another that `info` lists.")
    model: str | Path | None = _model(
        None,
        "--model -m SOURCE",
        "Its weights: a folder, a .safetensors file, or a hub id such as Wan-AI/Wan2.1-T2V-14B-Diffusers.",
        shown="the backbone's own",
    )
    revision: str | None = _model(None, "--revision NAME", "Branch, tag or commit of a hub id.")
    offline: bool = _model(False, "--offline", "Never ask the hub; use what has been downloaded.", free=True)
    context: Path | None = _model(None, "--context FILE", "The empty text, from ebr-engine cache-text; spares the text encoders.")
    vae: Path | None = _model(None, "--vae FOLDER", "Another VAE, in diffusers' layout; a tiny one is for --preview.")
    sample_latents: bool = _model(
        False, "--sample-latents", "Draw latents from the VAE's posterior, as released, rather than take its mode."
    )
    engine: Path | None = _model(None, "--engine FILE", "A file from ebr-engine build or export, in place of all of the above.")

    device: str = _computing("auto", "--device NAME", "auto, cpu, cuda or cuda:N.", free=True)
    devices: str | None = _computing(
        None,
        "--devices LIST",
        "Several that share each picture or clip, such as cuda:0,cuda:1; for large models.",
        shown="one",
        free=True,
    )
    precision: str = _computing(
        "auto",
        "--precision",
        "Of the transformer; auto goes by the device; int8 is for CPUs.",
        choices=PRECISIONS,
        switch=("--fp8", "fp8", "Short for --precision fp8."),
    )
    fp8_attention: bool = _computing(
        False,
        "--fp8-attention",
        "Self-attention in eight bits, on GPUs of compute capability 8.9 or newer; a CPU emulates it, slowly.",
    )
    offload: str = _computing(
        "none",
        "--offload",
        "What waits in main memory while a small GPU does not need it; blocks is the most.",
        choices=OFFLOADS,
        free=True,
    )
    compile: str = _computing(
        "auto",
        "--compile",
        "Compile the transformer for every size of picture; auto where that pays, and with CUDA graphs on a GPU.",
        choices=COMPILES,
    )
    tile: int | None = _tiling(
        None,
        "--tile PIXELS",
        "Side of a tile; smaller needs less memory; 0 never tiles.",
        span=AT_LEAST_0,
        shown="by backbone",
    )
    tile_overlap: int | None = _tiling(
        None, "--tile-overlap PIXELS", "What neighbouring tiles share.", span=AT_LEAST_0, shown="by backbone"
    )
    tile_blend: str = _tiling(
        "latent",
        "--tile-blend",
        "latent: tiles agree in every step; pixel: each runs alone, with less memory.",
        choices=BLENDS,
    )
    max_memory: str | int | None = _computing(
        None,
        "--max-memory SIZE",
        "Such as 8G: choose tiles, chunks and what waits in main memory so that this is enough.",
        shown="all there is",
    )
    low_memory: bool = _computing(False, "--low-memory", "All that saves memory without smaller tiles or chunks; slower.")

    def __post_init__(self) -> None:
        for one in fields(self):
            check_value(one, getattr(self, one.name))
        if self.task is not None and self.prompt:
            raise EngineError("give a task or a prompt, not both")
        self.encoder_options  # noqa: B018 (refuses what is not KEY=VALUE before any work)

    @classmethod
    def of(cls, **given: Any) -> "RestoreRequest":
        """A request by its fields' names; `EbrError` for a name that there is not, with the one that was meant."""
        check_names(given)
        if "prompt" in given:
            given["prompt"] = weighted(given["prompt"])
        return cls(**given)

    def with_(self, **given: Any) -> "RestoreRequest":
        """The same request but for these fields; errors as `of`."""
        check_names(given)
        if "prompt" in given:
            given["prompt"] = weighted(given["prompt"])
        return replace(self, **given)

    def part(self, *stages: str) -> dict[str, Any]:
        """The fields that these stages read, as keyword arguments."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.metadata["stage"] in stages}

    @property
    def encoder_options(self) -> dict[str, str]:
        """The encoder's options as a dict; `EbrError` for one that is not KEY=VALUE."""
        pairs = [text.partition("=") for text in self.encoder]
        if wrong := [key for key, equals, _ in pairs if not (key and equals)]:
            raise EbrError(f"-e {wrong[0]}: an encoder option is written KEY=VALUE")
        return {key: value for key, _, value in pairs}

    def to_json(self) -> dict[str, Any]:
        """What differs from the defaults, as JSON has it; `from_json` reads it. Prompts have to be files."""
        changed = {name: getattr(self, name) for name, one in FIELDS.items() if getattr(self, name) != one.default}
        return {name: _plain(value) for name, value in changed.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RestoreRequest":
        """The request of `to_json`'s values, each checked; `EbrError` for one of another type or name."""
        check_names(values)
        return cls.of(**{name: typed(FIELDS[name], value) for name, value in values.items()})

    def digest(self, prompts: Iterable[tuple[Path, float]] = ()) -> str:
        """A digest of all that decides what is written: the fields, and the content of the `prompts` that are used.

        Files among the fields count by size and time of their last change.
        """
        names = [one.name for one in FIELDS.values() if not one.metadata.get("free")]
        values = {name: _plain(getattr(self, name)) for name in names}
        files = {name: _stamp(value) for name in names if isinstance(value := getattr(self, name), Path) and value.is_file()}
        contents = [[hashlib.sha256(Path(path).read_bytes()).hexdigest(), weight] for path, weight in prompts]
        content = json.dumps([values, self.task, contents, files], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]


FIELDS: dict[str, Field] = {one.name: one for one in fields(RestoreRequest)}


def names_of(*stages: str) -> tuple[str, ...]:
    """The names of the fields that these stages read."""
    return tuple(name for name, one in FIELDS.items() if one.metadata["stage"] in stages)


def check_names(given: Iterable[str], known: Sequence[str] = tuple(FIELDS), where: str = "") -> None:
    """`EbrError` for a name that is not `known`, with the nearest one that is."""
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise EbrError(f"unknown {where or 'argument'} {name!r}{hint}")


def check_value(one: Field, value: Any, label: str = "") -> None:
    """`EngineError` unless a field may have this value; `label` names it in place of its own name."""
    about = one.metadata
    if value is None and one.default is None:
        return
    if choices := about.get("choices"):
        check_choice(one.name.replace("_", " "), value, choices)
    if "span" not in about or isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    least, most = about["span"]
    inside = least < value < most if about.get("open") else least <= value <= most
    if not inside:  # so that NaN fails too
        span = f"above {least:g} and below {most:g}" if about.get("open") else _span(least, most)
        raise EngineError(f"{label or 'the ' + one.name.replace('_', ' ')} must be {span}, got {value}")


def typed(one: Field, value: Any) -> Any:
    """A value of JSON or of a manifest's text in a field's type; `EbrError` for one that cannot be."""
    kind = str(one.type) if not isinstance(one.type, type) else one.type.__name__
    try:
        if one.name == "prompt":
            return tuple((Path(path), float(weight)) for path, weight in value)
        if one.name == "encoder" and not isinstance(value, str):
            return tuple(map(str, value))
        if isinstance(value, str) and value == "" and one.default is None:
            return None
        if kind.startswith("bool"):
            return {"true": True, "false": False, True: True, False: False}[value.lower() if isinstance(value, str) else value]
        if isinstance(value, bool):
            raise ValueError
        if kind.startswith("int"):
            return int(value) if isinstance(value, str) or value == int(value) else float("nan")
        if kind.startswith("float"):
            return float(value)
        if kind.startswith("pathlib") and isinstance(value, str):
            return Path(value)
        if isinstance(value, str) or (value is None and one.default is None):
            return value
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        pass
    raise EbrError(f"{one.name} cannot be {json.dumps(value, default=str)[:40]}")


def weighted(prompt: Any) -> tuple[tuple[Any, float], ...]:
    """Prompts with weights from a prompt, a file, or a list of them or of (prompt, weight); () for None.

    Raises `EngineError` for a weight that is no finite number.
    """
    if prompt is None:
        return ()
    single = not isinstance(prompt, (list, tuple)) or (len(prompt) == 2 and isinstance(prompt[1], (int, float)))
    pairs = [item if isinstance(item, tuple) else (item, 1.0) for item in ([prompt] if single else prompt)]
    for _, weight in pairs:
        if not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise EngineError(f"a prompt's weight must be a finite number, got {weight}")
    return tuple((one, float(weight)) for one, weight in pairs)


def _span(least: float, most: float) -> str:
    return f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
