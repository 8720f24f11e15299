"""Prompts: the file format, safe import of released files, checks and mixing."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ebr_engine.backbones.registry import BACKBONES, published, spec
from ebr_engine.bridge.schedules import RELEASED_STEPS, RELEASED_T0, RELEASED_T_MIN
from ebr_engine.errors import PromptError
from ebr_engine.prompts.catalogue import FINEST
from ebr_engine.tensor_files import write_tensors

FORMAT = "ebr-engine prompt 1"
DETAILS = ("model", "input")
log = logging.getLogger("ebr_engine")


@dataclass(frozen=True)
class Prompt:
    """A learned prompt: a residual on the attention context of every block, and its strength in each."""

    residual: Tensor  # [L, D] float32, one for all blocks; or [blocks, L, D], each block's own
    alpha: Tensor  # [blocks] float32
    backbone: str
    task: str = ""
    base_model: str = ""
    t0: float = RELEASED_T0
    t_min: float = RELEASED_T_MIN
    steps: int = RELEASED_STEPS
    detail: str = "model"  # whose detail a restored picture has: the model's, or the input's where the degradation is smooth
    supersample: int = 1  # how many times finer than its pixels the transformer sees a picture, either way
    deconvolve: bool = False  # whether the blur that a picture shows is taken out before the transformer sees it
    training: dict = field(default_factory=dict)  # free-form summary of how it was learned

    @property
    def injection(self) -> str:
        """`dual` (a second cross-attention branch: Wan) or `add` (rows added to the text tokens: FLUX)."""
        return spec(self.backbone).injection

    def check(self, backbone: str, width: int, blocks: int) -> None:
        """Raise `PromptError` unless the prompt fits a backbone of this name, width and number of blocks.

        One that was learned on a related backbone of the same sizes is taken with a warning.
        """
        if not self.is_for(backbone):
            raise PromptError(f"this prompt is for the {self.backbone} backbone, not for {backbone}")
        if self.residual.shape[-1] != width or self.alpha.shape[0] != blocks:
            raise PromptError(
                f"this prompt has width {self.residual.shape[-1]} and {self.alpha.shape[0]} blocks; "
                f"the {backbone} backbone has width {width} and {blocks} blocks"
            )
        if self.backbone != backbone:
            warning = "this prompt was learned on another model, of the %s backbone: what it does with %s's is not known"
            log.warning(warning, self.backbone, backbone)

    def is_for(self, backbone: str) -> bool:
        """Whether the prompt is for a backbone of this name, or was learned on one that is related to it."""
        return self.backbone == backbone or self.backbone in spec(backbone).related

    def save(self, path: Path | str) -> None:
        """Write the prompt as safetensors, atomically."""
        path = Path(path)
        metadata = {
            "format": FORMAT,
            "backbone": self.backbone,
            "base_model": self.base_model,
            "injection": self.injection,
            "task": self.task,
            "t0": repr(self.t0),
            "t_min": repr(self.t_min),
            "steps": str(self.steps),
            "training": json.dumps(self.training),
        }
        if self.detail != "model":
            metadata["detail"] = self.detail
        if self.supersample != 1:
            metadata["supersample"] = str(self.supersample)
        if self.deconvolve:
            metadata["deconvolve"] = "true"
        try:
            write_tensors(path, {"residual": self.residual.float(), "alpha": self.alpha.float()}, metadata)
        except (OSError, SafetensorError) as error:
            raise PromptError(f"cannot write {path}: {error}") from error


def load_prompt(path: Path | str) -> Prompt:
    """Read a prompt file of either kind: ours (`.safetensors`) or a released `.pt`; nothing is ever unpickled freely.

    Raises `PromptError` for a file that is missing, damaged, of another format, or holds non-finite numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise PromptError(f"no such prompt file: {path}")
    released = path.suffix in (".pt", ".pth")
    prompt = import_released(path) if released else _read(path)
    residual, alpha = prompt.residual, prompt.alpha
    fits = residual.ndim == 2 or (not released and residual.ndim == 3 and residual.shape[:1] == alpha.shape)
    if not fits or alpha.ndim != 1 or not residual.numel() or not alpha.numel():
        shapes = f"residual {tuple(residual.shape)}, alpha {tuple(alpha.shape)}"
        raise PromptError(f"{path} has wrong shapes: {shapes}; expected [L, D] or [blocks, L, D], and [blocks]")
    if not (prompt.residual.isfinite().all() and prompt.alpha.isfinite().all()):
        raise PromptError(f"{path} holds values that are not finite")
    return prompt


def _read(path: Path) -> Prompt:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            residual, alpha = file.get_tensor("residual").float(), file.get_tensor("alpha").float()
    except (OSError, SafetensorError) as error:
        raise PromptError(f"{path} is not a prompt file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise PromptError(f"{path} is not a prompt file: its format is {metadata.get('format')!r}, expected {FORMAT!r}")
    if metadata.get("backbone") not in BACKBONES:
        raise PromptError(f"{path} is for an unknown backbone, {metadata.get('backbone')!r}")
    try:
        numbers = {"t0": float(metadata["t0"]), "t_min": float(metadata["t_min"]), "steps": int(metadata["steps"])}
        numbers["supersample"] = int(metadata.get("supersample", 1))
        training = json.loads(metadata.get("training", "{}"))
    except (KeyError, ValueError) as error:
        raise PromptError(f"{path} has damaged metadata: {error}") from error
    times = 0 < numbers["t0"] < 1 and 0 < numbers["t_min"] < numbers["t0"]
    if not times or numbers["steps"] < 1 or not 1 <= numbers["supersample"] <= FINEST:
        raise PromptError(f"{path} has impossible settings: {numbers}")
    detail = metadata.get("detail", "model")
    if detail not in DETAILS:
        raise PromptError(f"{path} has impossible settings: detail {detail!r}, expected {' or '.join(DETAILS)}")
    deconvolve = metadata.get("deconvolve", "false")
    if deconvolve not in ("true", "false"):
        raise PromptError(f"{path} has impossible settings: deconvolve {deconvolve!r}, expected true or false")
    texts = {name: metadata.get(name, "") for name in ("backbone", "task", "base_model")}
    return Prompt(residual, alpha, **texts, **numbers, detail=detail, deconvolve=deconvolve == "true", training=training)


def import_released(path: Path) -> Prompt:
    """Read one of the authors' released `.pt` prompts: {"backend", "deep_prompt_bank": {"prompts": [1, L, D]}, "alphas"}."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        backend, bank, alphas = content["backend"], content["deep_prompt_bank"]["prompts"], content["alphas"]
        alpha = torch.stack([torch.as_tensor(a).detach().float().reshape(()) for a in alphas])
        residual = bank.detach().float().squeeze(0)
    except Exception as error:  # a damaged pickle raises almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PromptError(f"{path} is not a released prompt: {reason}") from error
    names = [one.name for one in published() if str(backend).lower().startswith(one.name)]
    backbone = max(names, key=len, default=None)  # FLUX.2's begins with FLUX.1's
    if backbone is None:
        raise PromptError(f"{path} is for an unknown backbone, {backend!r}")
    task = path.stem.lower().removeprefix(f"{backbone}_")
    return Prompt(residual.contiguous(), alpha, backbone, task=task, base_model=str(backend), training={"source": "released"})
