"""What every backbone's loader does: check a checkpoint against the model, put tensors in place."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ebr_engine.errors import BackboneError


class CheckedState(Mapping[str, Tensor]):
    """A state dict that must have a model's keys, and whose tensors must have the model's shapes when they are read.

    Raises `BackboneError` that names the first few missing or unexpected keys at once, a wrong shape when its turn comes:
    tensors that are read from a file one by one stay there until then.
    """

    def __init__(self, source: Mapping[str, Tensor], model: Mapping[str, Tensor]):
        self.source, self.model = source, model
        for problem, keys in (("misses", model.keys() - source.keys()), ("has unexpected", source.keys() - model.keys())):
            if keys:
                raise BackboneError(f"checkpoint {problem} {len(keys)} key(s): {', '.join(sorted(keys)[:4])}")

    def __getitem__(self, name: str) -> Tensor:
        tensor, shape = self.source[name], self.model[name].shape
        if tensor.shape != shape:
            raise BackboneError(f"{name} has shape {tuple(tensor.shape)} in the checkpoint, {tuple(shape)} in the model")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def __len__(self) -> int:
        return len(self.source)


def assign(
    module: nn.Module, parameters: Iterator[tuple[str, Tensor]], device: torch.device | str, dtype: torch.dtype | None
) -> None:
    """Put tensors one by one in their place in a module on the meta device, converted (None keeps the dtype) and frozen."""
    for name, tensor in parameters:
        owner, _, attribute = name.rpartition(".")
        value = tensor.to(device=device, dtype=dtype, copy=True).contiguous()
        setattr(module.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))
