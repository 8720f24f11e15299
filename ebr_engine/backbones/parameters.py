"""What every backbone's loader does: compare keys, put tensors in place."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ebr_engine.errors import BackboneError


def check_keys(expected: Iterable[str], source: Mapping[str, Tensor]) -> None:
    """`BackboneError` for missing or unexpected keys of a state dict; the first few are listed."""
    expected = set(expected)
    for problem, keys in (("misses", expected - source.keys()), ("has unexpected", source.keys() - expected)):
        if keys:
            raise BackboneError(f"checkpoint {problem} {len(keys)} key(s): {', '.join(sorted(keys)[:4])}")


def assign(
    module: nn.Module, parameters: Iterator[tuple[str, Tensor]], device: torch.device | str, dtype: torch.dtype | None
) -> None:
    """Put tensors one by one in their place in a module on the meta device, converted (None keeps the dtype) and frozen."""
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    for name, tensor in parameters:
        if tensor.shape != shapes[name]:
            raise BackboneError(f"{name} has shape {tuple(tensor.shape)} in the checkpoint, {tuple(shapes[name])} in the model")
        owner, _, attribute = name.rpartition(".")
        value = tensor.to(device=device, dtype=dtype, copy=True).contiguous()
        setattr(module.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))
