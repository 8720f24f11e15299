"""A trunk as a program of plain tensors and torch's standard operators: where every exported format starts from."""

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ebr_engine.backbones.base import Config
from ebr_engine.errors import EngineError
from ebr_engine.export.graph import Step, rotary_grid, token_grid
from ebr_engine.kernels import backend


class TrunkGraph(nn.Module):
    """A trunk as a function of tensors alone; its modules are copies that share the trunk's parameters.

    `step`: a step of the tables, for its kind and for how many rows of text run beside the picture's.
    """

    def __init__(self, trunk: nn.Module, step: Step):
        super().__init__()
        shared = {id(tensor): tensor for tensor in chain(trunk.parameters(), trunk.buffers())}
        self.trunk = copy.deepcopy(trunk, shared)
        self.step = type(step)
        places = trunk.config.text_rotary(step.text_rows) if step.text_rows else ()
        for name, table in zip(("text_cos", "text_sin"), places):  # constants of the graph
            self.register_buffer(name, table.to(next(trunk.parameters()).device), persistent=False)

    def forward(self, latent: Tensor, cos: Tensor, sin: Tensor, fields: Sequence[Tensor]) -> Tensor:
        """Velocity of `latent` at the step with these fields; `cos`, `sin` [*grid, head_dim/2] as of `rotary_grid`."""
        step = self.step(*fields)
        cos, sin = cos.flatten(0, -2), sin.flatten(0, -2)
        if step.text_rows:
            cos, sin = torch.cat((self.text_cos, cos)), torch.cat((self.text_sin, sin))
        self.trunk.rotary = lambda *_: (cos, sin)  # in place of the trunk's own, which are constants of one grid
        return self.trunk(latent, step)


def trace(
    graph: TrunkGraph,
    step: Step,
    latent: Sequence[int] | None,
    frames: bool = False,
    side: tuple[int, int] | None = None,
) -> ExportedProgram:
    """A trunk in torch's standard operators.

    `latent`: the only latent size that it takes, without the batch, which is 1; None leaves height, width and batch open, and
    with `frames` the number of frames too; `side` is the height and width of a latent that has no others. Raises `EngineError`
    where operations are forced through kernels of our own.
    """
    config = graph.trunk.config
    weight = next(graph.trunk.parameters())
    if backend.registered(weight):
        raise EngineError("a graph is made of plain torch operations; set EBR_KERNELS=torch to export")
    shape = (1, *latent) if latent else (2, *_example(config, frames, side))  # 1 would be taken for a constant
    grid = token_grid(config, shape)
    cos, sin = (table.to(weight.device) for table in rotary_grid(config, grid))
    fields = [table.contiguous() for table in step]  # a compiled package takes the strides that it was traced with
    arguments = (torch.zeros(shape, device=weight.device), cos, sin, fields)
    with torch.no_grad(), quiet():
        dims = None if latent else _dynamic(config, frames, side, len(step))
        return torch.export.export(graph.eval(), arguments, dynamic_shapes=dims, strict=False)


def _example(config: Config, frames: bool, cells: tuple[int, int] | None) -> tuple[int, ...]:
    """A latent size, without the batch, for tracing: any, but no 1 along what is to stay open."""
    time, *side = config.patch
    return config.latent_channels, (5 if frames else 1) * time, *(cells or (3 * side[0], 4 * side[1]))


def _dynamic(config: Config, frames: bool, side: tuple[int, int] | None, fields: int) -> tuple:
    """torch.export's description of the dimensions that stay open."""
    dims = [Dim("frames") if frames else None, *(2 * (None,) if side else (Dim("rows"), Dim("columns")))]
    latent = {i + 2: patch * dim if patch > 1 else dim for i, (patch, dim) in enumerate(zip(config.patch, dims)) if dim}
    table = {i: dim for i, dim in enumerate(dims) if dim}
    return {0: Dim("batch"), **latent}, table, table, [None] * fields


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' notes on packages that could also be there and on old names inside torch."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
