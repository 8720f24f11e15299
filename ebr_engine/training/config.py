"""The settings of a learning run: each documented once, here; read from TOML and the command line, written beside the result."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ebr_engine import request
from ebr_engine.backbones.registry import BACKBONES, medium_of, spec
from ebr_engine.errors import EbrError, check_choice
from ebr_engine.media import SOUND
from ebr_engine.prompts.catalogue import FINEST

BRIDGES = ("ebr", "naive", "ddbm")
LOSSES = ("pixel", "x0", "velocity")
DETAILS = request.DETAILS[1:]
PRECISIONS = tuple(one for one in request.PRECISIONS if one not in ("fp16", "int8"))  # gradients overflow, or there are none
OPTIMIZERS = ("adam", "adamw")
HEAVY = ("rain", "blur")  # tasks with damage of their own in `media/heavy.py`
BAD_DATA = ("refuse", "skip")
TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
SCENE_SIDE = 256  # pixels of a procedural scene
# Settings that sound has not.
OF_PICTURES = (
    "data",
    "photos",
    "stored",
    "heavy",
    "cache",
    "views",
    "detail",
    "deconvolve",
    "supersample",
    "ssim_weight",
    "validation",
    "validate_every",
)
SEEDS = 1_000_000_000  # of training: `degradations.seeds("train")`


def _setting(default: Any, group: str, text: str, free: bool = False, **option: Any) -> Any:
    """A field: `group` and `text` document it; `free` ones may differ between an interrupted run and its resumption.

    `option`: what its command line option has besides: `panel` (of `train --help`; without one it goes by --set alone),
    `short`, `metavar`, `choices`, and `by_backbone`, whether backbones have defaults of their own.
    """
    return field(default=default, metadata={"group": group, "help": text, "free": free, **option})


_WHAT, _MODEL, _DATA, _LEARNING, _RUN = ({"panel": name} for name in ("What to learn", "Model", "Data", "Learning", "Run"))


@dataclass(frozen=True)
class LearnConfig:
    """Settings of a prompt learning run; `help` of each field's metadata is its documentation. `EbrError` for impossible ones."""

    task: str = _setting(
        "",
        "prompt",
        "What the prompt is for: haze, rain, snow, blur or lowlight; noise, clipping or reverb of sound; with pairs any name.",
        **_WHAT,
        short="-t",
        metavar="NAME",
    )
    tokens: int = _setting(16, "prompt", "Rows of the prompt (wan 226, flux 512 by default).", **_LEARNING, by_backbone=True)
    alpha: float = _setting(
        0.1, "prompt", "Initial strength in every block; with 0 only the strengths move in the first step.", **_LEARNING
    )
    per_block: bool = _setting(False, "prompt", "A prompt of its own for each block, rather than one for all.")
    start: str = _setting("", "prompt", "A prompt file to begin from, with its strengths, in place of random rows and `alpha`.")

    backbone: str = _setting("mini", "model", "The frozen transformer.", **_MODEL, short="-b", choices=tuple(BACKBONES))
    model: str = _setting(
        "",
        "model",
        "Its weights: a folder, a file or a hub id; empty for the backbone's own.",
        **_MODEL,
        short="-m",
        metavar="SOURCE",
    )
    revision: str = _setting("", "model", "Branch, tag or commit of a hub id.", **_MODEL, metavar="NAME")
    offline: bool = _setting(False, "model", "Never ask the hub.", free=True)
    context: str = _setting(
        "", "model", "The empty text, from ebr-engine cache-text; spares the text encoders.", **_MODEL, metavar="FILE"
    )
    vae: str = _setting("", "model", "Another VAE, a folder in diffusers' layout.")
    precision: str = _setting("auto", "model", "Of the transformer.", **_MODEL, choices=PRECISIONS)
    checkpointing: bool = _setting(False, "model", "Keep only what enters each block and compute the rest again: less memory.")
    compile: bool = _setting(False, "model", "Compile the blocks: a few minutes, then faster steps.")
    sequence_parallel: bool = _setting(
        False, "model", "Several processes share the tokens of every sample, rather than the samples of a batch."
    )
    device: str = _setting(
        "auto", "model", "auto, cpu, cuda or cuda:N; several processes take a device each.", free=True, **_RUN, metavar="NAME"
    )

    data: str = _setting(
        "",
        "data",
        "Pairs: a folder with input/ and target/ (or another known layout), or a JSON list; empty for procedural scenes (mini).",
        **_DATA,
        short="-d",
        metavar="PATH",
    )
    synthetic: bool = _setting(False, "data", "`data` holds clean pictures or clips only; degrade them by `task` on the fly.")
    size: int | tuple[int, int] = _setting(
        64,
        "data",
        "Height and width of the crops in pixels, or one number for both.",
        **_DATA,
        metavar="N or HxW",
        by_backbone=True,
    )
    frames: int = _setting(
        1,
        "data",
        "Frames of a crop; 1 takes single frames from clips (wan: 4n + 1; mini-audio: of 16 ms).",
        **_DATA,
        metavar="N",
        by_backbone=True,
    )
    stride: int = _setting(1, "data", "Largest temporal stride; 1 to so many is drawn for each clip.")
    flip: bool = _setting(True, "data", "Mirror half of the crops.")
    views: int = _setting(
        0, "data", "Crops that are drawn of each pair, for a cache; 0 draws new ones in every epoch.", metavar="N"
    )
    cache: str = _setting(
        "", "data", "Folder of latents (ebr-engine cache-latents); what it lacks is encoded and added.", free=True
    )
    bad_data: str = _setting(
        "refuse", "data", "A pair that cannot be used: refuse to go on, or skip it, naming it.", **_DATA, choices=BAD_DATA
    )
    scenes: int = _setting(512, "data", "Procedural scenes or sounds held in memory.")
    photos: str = _setting("", "data", "Folder of clean photos to take crops of beside procedural scenes (mini).")
    photo_share: float = _setting(0.5, "data", "Share of the crops that is of photos, where there are any.")
    intact: float = _setting(0.0, "data", "Share of the crops of scenes and photos that is not degraded.")
    stored: float = _setting(0.0, "data", "Share of them whose degraded form has noise and traces of JPEG too.")

    heavy: float = _setting(
        0.0,
        "data",
        "Share of the degraded crops that is damaged as heavy public sets are: by a downpour (rain), a shaken camera (blur).",
    )

    bridge: str = _setting(
        "ebr", "objective", "The process to learn by; naive and ddbm for comparison.", **_LEARNING, choices=BRIDGES
    )
    loss: str = _setting(
        "pixel",
        "objective",
        "Error of the clean estimate in pixels (mini) or latents (x0), or of the velocity (default of wan and flux).",
        **_LEARNING,
        choices=LOSSES,
        by_backbone=True,
    )
    tone: float = _setting(0.0, "objective", "Extra weight of the error's means over blocks of the codec (pixel loss).")
    ssim_weight: float = _setting(0.0, "objective", "Weight of the result's 1 - SSIM beside its error (unroll, pixel loss).")
    even: float = _setting(
        0.0, "objective", "Weights samples by their own damage to this power, inverted: above 0, mild ones count as well (ebr)."
    )
    t0: float = _setting(0.4, "objective", "Where the bridge starts, between 0 and 1.", **_LEARNING)
    t_min: float = _setting(1e-4, "objective", "The least time.")
    power: float = _setting(1.0, "objective", "Times are t_min + (t0 - t_min) u^power; below 1 favours early steps.", **_LEARNING)
    on_policy: int = _setting(0, "objective", "Learn at the states that the fast sampler of so many steps visits; 0 does not.")
    detail: str = _setting(
        "model",
        "objective",
        "Whose detail a picture has, the file says: the model's, or the input's where damage is smooth.",
        choices=DETAILS,
    )
    deconvolve: bool = _setting(
        False,
        "objective",
        "Take the blur that a crop shows out of it first, as restoring then does too; crops of 160 pixels and more show it well.",
    )
    supersample: int = _setting(
        1,
        "objective",
        "How many times finer than its pixels the transformer sees a picture: 2 may restore better, in 5 times the time.",
    )
    unroll: int = _setting(
        0, "objective", "Learn through all steps of the fast sampler of so many, from the error of its result; 0 does not."
    )

    optimizer: str = _setting("adam", "optimisation", "adam or adamw.", choices=OPTIMIZERS)
    learning_rate: float = _setting(
        0.03, "optimisation", "For the prompt and its strengths (wan and flux 0.003 by default).", **_LEARNING, by_backbone=True
    )
    weight_decay: float = _setting(0.0, "optimisation", "Of adamw.")
    iterations: int = _setting(
        300, "optimisation", "Steps of the optimizer; the learning rate ends at a twentieth.", **_LEARNING, short="-n"
    )
    batch: int = _setting(32, "optimisation", "Crops a step, over all processes and parts.", **_LEARNING, by_backbone=True)
    accumulate: int = _setting(1, "optimisation", "Parts in which a process computes its share of the batch.")
    warmup: int = _setting(10, "optimisation", "Iterations in which the learning rate rises.")
    clip: float = _setting(0.0, "optimisation", "Largest norm of the gradient; 0 does not limit it.")
    ema: float = _setting(0.0, "optimisation", "Decay of the average that is saved in place of the last values; 0 for none.")
    seed: int = _setting(0, "optimisation", "Of everything random.", **_LEARNING)

    save_every: int = _setting(50, "running", "Iterations between checkpoints.", free=True)
    save_last_n: int = _setting(1, "running", "Checkpoints kept while the run goes on.", free=True)
    validate_every: int = _setting(0, "running", "Iterations between validations; 0 for none.", free=True)
    validation: str = _setting(
        "",
        "running",
        "Pairs to validate on every `validate_every` iterations, as `data`; empty takes unseen procedural scenes.",
        free=True,
        **_DATA,
        metavar="PATH",
    )
    validation_count: int = _setting(4, "running", "Pictures or clips of a validation.", free=True)
    tensorboard: bool = _setting(False, "running", "Write events for TensorBoard.", free=True)
    wandb: str = _setting("", "running", "Project of Weights & Biases to log to.", free=True)

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_numbers(self)
        model, sound = spec(self.backbone), medium_of(self.backbone) == SOUND
        if sound and (given := [name for name in OF_PICTURES if getattr(self, name) != SETTINGS[name].default]):
            raise EbrError(f"{self.backbone} is learned from synthesised sound: leave {', '.join(given)} out")
        if not self.data:
            if self.synthetic:
                raise EbrError("synthetic needs data: a folder of clean pictures or clips")
            if not model.learning.scenes:
                raise EbrError(f"{self.backbone} is learned from pairs: name a folder or a JSON list with --data")
            if not sound and not all(32 <= side <= SCENE_SIDE for side in self.crop):
                raise EbrError(f"the crop size must lie between 32 and {SCENE_SIDE} for procedural scenes, got {self.size}")
        if self.loss not in model.learning.losses:
            raise EbrError(f"the pixel loss needs mini's orthonormal codec; use velocity or x0 for {self.backbone}")
        if self.frames != 1 and not model.knows_time:
            raise EbrError(f"{self.backbone} knows no time: frames must be 1, got {self.frames}")
        if self.data and self.validate_every and not self.validation:
            raise EbrError("validation is needed to validate: pairs that are not learned from, as data")
        if self.cache and not self.views:
            raise EbrError("a cache needs views: how many crops of each pair it holds")

    @property
    def steps(self) -> int | None:
        """Evaluations of the fast sampler that the prompt is learned for; None where any will do."""
        return self.on_policy or self.unroll or None

    @property
    def crop(self) -> tuple[int, int]:
        """Height and width of the crops."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size


def _check_choices(config: LearnConfig) -> None:
    for name, one in SETTINGS.items():
        if choices := one.metadata.get("choices"):
            check_choice(name, getattr(config, name), choices)
    if config.synthetic or not config.data:
        check_choice("task", config.task, spec(config.backbone).tasks)
    if config.heavy and (config.task not in HEAVY or config.data):
        raise EbrError(f"heavy damage is of scenes and photos: use it without data, and with task {' or '.join(HEAVY)}")
    if not TASK_NAME.fullmatch(config.task):
        raise EbrError(f"{config.task!r} cannot name a task: use letters, digits, - and _")


def _check_numbers(config: LearnConfig) -> None:
    if not 0 < config.t_min < config.t0 < 1:
        raise EbrError(f"t_min and t0 must fulfil 0 < t_min < t0 < 1, got {config.t_min} and {config.t0}")
    at_least = {1: "tokens iterations batch accumulate warmup scenes frames stride save_every save_last_n validation_count"}
    at_least[0] = "views on_policy unroll clip weight_decay validate_every tone even ssim_weight"
    for least, names in at_least.items():
        for name in names.split():
            if not getattr(config, name) >= least:
                raise EbrError(f"{name} must be at least {least}, got {getattr(config, name)}")
    for name in ("power", "learning_rate"):
        if not 0 < getattr(config, name) < math.inf:
            raise EbrError(f"{name} must be a positive number, got {getattr(config, name)}")
    if not 1 <= config.supersample <= FINEST:
        raise EbrError(f"supersample must lie between 1 and {FINEST}, got {config.supersample}")
    for name in ("photo_share", "intact", "stored", "heavy"):
        if not 0 <= getattr(config, name) <= 1:
            raise EbrError(f"{name} must be a share from 0 to 1, got {getattr(config, name)}")
    if not 0 <= config.ema < 1:
        raise EbrError(f"ema must be at least 0 and below 1, got {config.ema}")
    if not 0 <= config.seed < SEEDS:
        raise EbrError(f"the seed must be one of training, from 0 to {SEEDS - 1}, got {config.seed}")
    if any(side < 8 or side % 8 for side in config.crop):
        raise EbrError(f"the crop size must be a multiple of 8, got {config.size}")
    if config.batch % config.accumulate:
        raise EbrError(f"accumulate must divide the batch of {config.batch}, got {config.accumulate}")
    for name in ("on_policy", "unroll"):
        if getattr(config, name) and config.bridge != "ebr":
            raise EbrError(f"{name} follows EBR's sampler; it cannot be used with the bridge {config.bridge}")
    if config.unroll and config.on_policy:
        raise EbrError("unroll learns from the sampler's result, on_policy from its states: choose one")
    if config.ssim_weight and not (config.unroll and config.loss == "pixel"):
        raise EbrError("ssim_weight is of the sampler's result in pixels: it needs unroll and the loss pixel")
    if config.unroll and config.loss == "velocity":
        raise EbrError("unroll learns from the sampler's result, which has no velocity: use the loss pixel or x0")


SETTINGS: dict[str, Field] = {one.name: one for one in fields(LearnConfig)}
FREE = frozenset(name for name, one in SETTINGS.items() if one.metadata["free"]) | {"iterations"}


def resolve(given: Mapping[str, Any]) -> LearnConfig:
    """A configuration of what is given and of the backbone's defaults; `EbrError` names an unknown or wrong setting."""
    for name in given:
        if name not in SETTINGS:
            near = get_close_matches(name, SETTINGS, 1)
            raise EbrError(f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    values = {name: _typed(name, value) for name, value in given.items()}
    backbone = values.get("backbone", LearnConfig.backbone)
    return LearnConfig(**((spec(backbone).learning.defaults if backbone in BACKBONES else {}) | values))


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, at its top or in tables of any name; `EbrError` for a file that cannot be read."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise EbrError(f"cannot read the configuration {path}: {error}") from error
    settings: dict[str, Any] = {}
    for name, value in content.items():
        settings |= value if isinstance(value, dict) else {name: value}
    return settings


def read_assignments(texts: list[str]) -> dict[str, str]:
    """`key=value` texts; `EbrError` for one without an equals sign."""
    for text in texts:
        if "=" not in text:
            raise EbrError(f"{text!r} is not of the form key=value")
    return {name.strip(): value.strip() for name, value in (text.split("=", 1) for text in texts)}


def _typed(name: str, value: Any) -> Any:
    """A value of TOML or the command line in the setting's type."""
    kind = SETTINGS[name].type
    try:
        if name == "size":
            return _size(value)
        if kind is bool:
            return {"true": True, "false": False, True: True, False: False}[value.lower() if isinstance(value, str) else value]
        if kind is str and isinstance(value, (str, Path)):
            return str(value)
        if kind is int and float(value) == int(float(value)) and not isinstance(value, bool):
            return int(float(value))
        if kind is float and not isinstance(value, bool):
            return float(value)
    except (ValueError, TypeError, KeyError, OverflowError, AttributeError):
        pass
    raise EbrError(f"{name} = {value!r} is not a {'text' if kind is str else kind.__name__ if name != 'size' else 'size'}")


def _size(value: Any) -> int | tuple[int, int]:
    """64, "64", "480x832" or [480, 832]."""
    parts = value.lower().split("x") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    sides = tuple(int(side) for side in parts)
    if len(sides) not in (1, 2):
        raise ValueError
    return sides[0] if len(sides) == 1 else sides


def to_toml(config: LearnConfig) -> str:
    """All settings with their documentation, in tables by group; what `read_toml` reads."""
    lines: list[str] = []
    group = None
    for name, one in SETTINGS.items():
        if one.metadata["group"] != group:
            group = one.metadata["group"]
            lines += ["", f"[{group}]"]
        lines += [f"# {one.metadata['help']}", f"{name} = {_toml(getattr(config, name))}"]
    return "\n".join(lines[1:]) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (bool, str)) else repr(value)


def described(config: LearnConfig) -> list[str]:
    """All settings, a line a group, for a person."""
    groups: dict[str, list[str]] = {}
    for name, one in SETTINGS.items():
        if (value := getattr(config, name)) != "":
            groups.setdefault(one.metadata["group"], []).append(f"{name} {value if isinstance(value, str) else _toml(value)}")
    return [f"{group}: {', '.join(values)}" for group, values in groups.items()]
