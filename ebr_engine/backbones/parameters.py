"""What every backbone's loader does: read tensors from files, check them against the model, put them in place."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ebr_engine.errors import BackboneError


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of memory-mapped safetensors files; one is read when it is asked for, and then is a view of its file.

    Raises `BackboneError` that names a file which is missing, truncated or not in this format.
    """

    def __init__(self, paths: Iterable[Path]):
        self._places = {}  # name: open file, name in it
        for path in paths:
            try:
                file = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                reason = " ".join(str(error).split())
                raise BackboneError(f"{path} is truncated or damaged, fetch it again ({reason})") from error
            self._places |= {name: (file, name) for name in file.keys()}  # noqa: SIM118

    def under(self, prefix: str) -> "TensorFiles":
        """The tensors whose names begin with `prefix`, without it."""
        part = TensorFiles(())
        part._places = {name.removeprefix(prefix): at for name, at in self._places.items() if name.startswith(prefix)}
        return part

    def __getitem__(self, name: str) -> Tensor:
        file, key = self._places[name]
        return file.get_tensor(key)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor, of which no others are read."""
        file, key = self._places[name]
        return file.get_slice(key)[start:stop]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that is not read."""
        file, key = self._places[name]
        return tuple(file.get_slice(key).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype of a tensor that is not read, by its name in the format (`BF16`)."""
        file, key = self._places[name]
        return file.get_slice(key).get_dtype()

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


KINDS = {"weight": "weight", "bias": "bias", "scale": "weight"}  # of a layer's tensors, originally and in diffusers
Shares = Mapping[str, str | Mapping[str, int]]


class Piece(NamedTuple):
    """Where a tensor lies in the original layout: rows first/of to last/of of the tensor `key`, their halves swapped or not."""

    key: str
    first: int = 0
    last: int = 1
    of: int = 1
    swapped: bool = False


@dataclass(frozen=True)
class OriginalNames:
    """The names of layers in a model's original layout, and diffusers'.

    A fused layer has several: diffusers' layers in the order of its rows, and the share of the rows that each has.
    """

    ends: Shares
    blocks: Mapping[str, tuple[str, Shares]]  # by the word before a block's number: diffusers' word, and the names within
    swapped: str = ""  # diffusers' name of a layer whose halves are the other way round

    def pieces(self, key: str) -> Iterator[tuple[str, Piece]]:
        """What diffusers makes of an original tensor: its name there and the piece; nothing for a key that is not known."""
        names, prefix, rest = self.ends, "", key
        numbered = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", key)
        if numbered and numbered[1] in self.blocks:
            block, names = self.blocks[numbered[1]]
            prefix, rest = f"{block}.{numbered[2]}.", numbered[3]
        layer, _, kind = rest.rpartition(".")
        layer, suffix = (layer, f".{KINDS[kind]}") if kind in KINDS else (rest, "")
        found = names.get(layer, {})
        shares = {found: 1} if isinstance(found, str) else found
        first, of = 0, sum(shares.values())
        for name, share in shares.items():
            yield f"{prefix}{name}{suffix}", Piece(key, first, first + share, of, swapped=name == self.swapped)
            first += share


class OriginalState(Mapping[str, Tensor]):
    """The tensors of files in an original layout, under diffusers' names; fused ones are sliced in the file.

    Keys that the model does not have keep their name. Raises `BackboneError` for a fused tensor that cannot be split.
    """

    def __init__(self, names: OriginalNames, files: TensorFiles):
        self.files = files
        self.pieces = {name: piece for key in files for name, piece in (list(names.pieces(key)) or [(key, Piece(key))])}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that is not read."""
        piece = self.pieces[name]
        whole = self.files.shape(piece.key)
        if piece.of == 1:
            return whole
        rows, *rest = whole or (0,)
        if rows % piece.of:
            raise BackboneError(f"{piece.key} has {rows} rows, which are not {piece.of} equal parts")
        return rows // piece.of * (piece.last - piece.first), *rest

    def __getitem__(self, name: str) -> Tensor:
        piece = self.pieces[name]
        if piece.of == 1:
            whole = self.files[piece.key]
            return torch.cat(whole.chunk(2)[::-1]) if piece.swapped else whole
        share = self.shape(name)[0] // (piece.last - piece.first)
        return self.files.rows(piece.key, share * piece.first, share * piece.last)

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)


State = TensorFiles | OriginalState


def shapes(state: State) -> Callable[[str, int], tuple[int, ...]]:
    """A function that gives the shape of a tensor with a number of axes; `BackboneError` when it is missing or other."""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in state:
            raise BackboneError(f"checkpoint misses {name}")
        if len(found := state.shape(name)) != axes or 0 in found:
            raise BackboneError(f"{name} has shape {found} in the checkpoint, {axes} axes are expected")
        return found

    return shape


def count_blocks(state: Mapping[str, Tensor], word: str) -> int:
    """How many blocks the highest number after `word` stands for."""
    return 1 + max((int(name.split(".", 2)[1]) for name in state if re.match(rf"{word}\.\d+\.", name)), default=-1)


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
    module: nn.Module,
    parameters: Iterator[tuple[str, Sequence[Tensor]]],
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> None:
    """Put tensors one by one in their place in a module on the meta device, converted (None keeps the dtype) and frozen.

    A parameter comes as pieces that follow each other in its memory. They are copied straight into it, so that a fused or
    reordered one is never a second time in memory.
    """
    for name, pieces in parameters:
        shape = module.get_parameter(name).shape
        value = torch.empty(shape, device=device, dtype=pieces[0].dtype if dtype is None else dtype)
        places = value.view(-1).split([piece.numel() for piece in pieces])
        for place, piece in zip(places, pieces):
            place.view(piece.shape).copy_(piece)
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))


def load_halves(
    config: Any,
    halves: tuple[type[nn.Module], type[nn.Module]],
    names: tuple[Callable, Callable, Callable],
    source: Mapping[str, Tensor],
    device: torch.device | str,
    dtype: torch.dtype,
    kept: torch.dtype | None = None,
) -> tuple[Any, Any]:
    """Conditioner and trunk (`halves`) of a state dict, frozen; trunk in `dtype` on `device`, conditioner on the CPU.

    `names`: the inverse, which gives both halves as one state dict, and what yields the conditioner's and the trunk's parameters
    from one; `kept`: the conditioner's dtype, None as stored. Raises `BackboneError` for missing or unexpected keys (the first
    few are listed) and for shapes that do not fit `config`.
    """
    joined, conditioner_parameters, trunk_parameters = names
    with torch.device("meta"):
        conditioner, trunk = (half(config) for half in halves)
    source = CheckedState(source, joined(conditioner, trunk))
    assign(conditioner, conditioner_parameters(config, source), "cpu", kept)
    assign(trunk, trunk_parameters(config, source), device, dtype)
    return conditioner, trunk


def pairs_to_halves(x: Tensor, head_dim: int) -> Tensor:
    """Take each head's rotary pairs from interleaved (checkpoint) to halves (see `qk_norm_rope`).

    Rows [heads·head_dim, ...] → view [heads, 2, head_dim/2, ...], whose order is the new one.
    """
    return x.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2)


def halves_to_pairs(x: Tensor, head_dim: int) -> Tensor:
    """The inverse of `pairs_to_halves`: rows [heads·head_dim, ...] → a tensor of that shape."""
    return x.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
