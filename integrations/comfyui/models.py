"""A restorer as one of ComfyUI's models: loaded when a node needs it, let go when ComfyUI wants the memory."""

from typing import Any

import comfy.model_management as management
import torch
from comfy.model_patcher import ModelPatcher

from ebr_engine.engine.restorer import Restorer


class EbrRestorer(torch.nn.Module):
    """What ComfyUI holds on to while the weights come and go; its name is what ComfyUI's log shows."""


class Model(ModelPatcher):
    """The restorer of these options. ComfyUI calls `partially_load` and `detach`; nodes call `ready`.

    A restorer is there as a whole or not at all: its own `offload` decides what waits in main memory.
    """

    def __init__(self, **options: Any):
        device = management.get_torch_device()
        self.restorer: Restorer | None = None
        self._size: int | None = None  # bytes; known once it has been loaded
        super().__init__(EbrRestorer(), load_device=device, offload_device=torch.device("cpu"))
        self.options = {**options, "device": str(device) if device.type == "cuda" else "cpu"}

    def ready(self) -> Restorer:
        """The restorer, loaded now if need be. Before the first time ComfyUI's other models leave: its size is not known yet."""
        if self._size is None and self.load_device.type != "cpu":
            management.unload_all_models()
        management.load_models_gpu([self])
        if self.restorer is None:  # a ComfyUI that takes it for loaded
            self._load()
        return self.restorer

    def _load(self) -> None:
        # ComfyUI runs nodes in inference mode, whose tensors neither graphs nor compiled code may change later.
        with torch.inference_mode(False):
            self.restorer = Restorer(**self.options)
        trunk = self.restorer.trunk
        tensors = (*trunk.parameters(), *trunk.buffers()) if isinstance(trunk, torch.nn.Module) else ()
        self._size = sum(one.nbytes for one in tensors)

    def model_size(self) -> int:
        return self._size or 0

    def loaded_size(self) -> int:
        return self.model_size() if self.restorer is not None else 0

    def current_loaded_device(self) -> torch.device:
        return self.offload_device if self.restorer is None else self.load_device

    def model_dtype(self) -> torch.dtype:
        return torch.float32

    def model_patches_to(self, device: Any) -> None:
        """There are no patches."""

    def partially_load(self, device_to: Any, extra_memory: float = 0, *_: Any, **__: Any) -> int:
        """Load all of it; the bytes that it took."""
        if self.restorer is not None:
            return 0
        self._load()
        return self.model_size()

    def partially_unload(self, *_: Any, **__: Any) -> int:
        """Nothing is given back in part: ComfyUI then asks for all of it."""
        return 0

    def detach(self, *_: Any, **__: Any) -> torch.nn.Module:
        """Let go of everything; the next `ready` loads it again."""
        self.restorer = None
        management.soft_empty_cache()
        return self.model

    def clone(self, *_: Any, **__: Any) -> "Model":
        return self

    def is_clone(self, other: Any) -> bool:
        return other is self

    def __del__(self) -> None:
        """Nothing to undo, as there are no patches."""
