"""Pictures of any kind (PIL image, array, tensor) to pixels and back to their kind."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebr_engine.errors import EngineError


def to_tensor(image: Any) -> tuple[Tensor, Any]:
    """Pixels [B, 3, H, W] float32 in [0, 1] of an image of any kind, and the function that turns a result back into that kind."""
    if isinstance(image, Tensor):
        return _from_torch(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if hasattr(image, "mode") and hasattr(image, "convert"):
        return _from_pil(image)
    raise EngineError(f"cannot restore a {type(image).__name__}; give a PIL image, an array [H, W, 3] or a tensor [3, H, W]")


def _from_torch(image: Tensor) -> tuple[Tensor, Any]:
    if image.ndim not in (3, 4) or image.shape[-3] != 3 or not image.is_floating_point() or not image.numel():
        raise EngineError(f"expected a float tensor [3, H, W] or [B, 3, H, W], got {image.dtype} {tuple(image.shape)}")
    pixels = image.detach().float().cpu()
    _check_range(pixels)

    def rebuild(result: Tensor) -> Tensor:
        return result.reshape(image.shape).to(image.device, image.dtype)

    return pixels.view(-1, *pixels.shape[-3:]), rebuild


def _from_array(image: np.ndarray) -> tuple[Tensor, Any]:
    """Colour [H, W, 3], grey [H, W] or [H, W, 1], either with alpha behind it ([H, W, 4], [H, W, 2]), which stays as it is."""
    grey = image.ndim == 2 or (image.ndim == 3 and image.shape[-1] in (1, 2))
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[-1] > 4) or not image.size:
        raise EngineError(f"expected an array [H, W, 3] (or grey [H, W], or with alpha [H, W, 4]), got shape {image.shape}")
    if image.dtype not in (np.uint8, np.uint16, np.float16, np.float32, np.float64):
        raise EngineError(f"expected uint8, uint16 or float pixels, got {image.dtype}")
    planes = image[..., None] if image.ndim == 2 else image
    colours = 1 if grey else 3
    top = np.iinfo(image.dtype).max if image.dtype.kind == "u" else 1
    shown = np.repeat(planes[..., :1], 3, axis=-1) if grey else planes[..., :3]
    values = np.require(shown, np.float32, ("C", "W"))  # itself where it can be: a copy of a large picture is large
    pixels = torch.from_numpy(values / np.float32(top) if top != 1 else values).permute(2, 0, 1)[None]
    _check_range(pixels)

    def rebuild(result: Tensor) -> np.ndarray:
        values = (luma(result)[0, ..., None] if grey else result[0].permute(1, 2, 0)).numpy()
        made = (values * top).round() if image.dtype.kind == "u" else values
        made = made.astype(image.dtype, copy=False)
        alpha = planes[..., colours:]
        return (np.concatenate((made, alpha), axis=-1) if alpha.size else made).reshape(image.shape)

    return pixels, rebuild


def luma(pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] → grey [B, H, W], as PIL's convert("L")."""
    return torch.einsum("bchw,c->bhw", pixels, torch.tensor([0.299, 0.587, 0.114]))


def _from_pil(image: Any) -> tuple[Tensor, Any]:
    if image.mode in ("I", "F"):
        raise EngineError(f"a PIL image of mode {image.mode} does not say its range; convert it to I;16, L or RGB")
    deep = image.mode.startswith("I;16")  # PIL's own conversion to RGB would clip it
    array = np.asarray(image).astype(np.uint16) if deep else np.asarray(image.convert("RGB"))
    pixels, rebuild_array = _from_array(array)

    def rebuild(result: Tensor) -> Any:
        from PIL import Image

        restored = Image.fromarray(rebuild_array(result))
        if image.mode in ("L", "LA", "1"):
            restored = restored.convert("L")
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            restored.putalpha(image.convert("RGBA").getchannel("A"))
        restored.info = {name: value for name, value in image.info.items() if name != "transparency"}
        return restored

    return pixels, rebuild


def _check_range(pixels: Tensor) -> None:
    low, high = pixels.aminmax()  # NaN if any value is
    if not (low.isfinite() and high.isfinite()):
        raise EngineError("the picture holds values that are not finite")
    if low < 0 or high > 1:
        raise EngineError(f"pixels must lie in [0, 1], got {low:.3g} to {high:.3g}")
