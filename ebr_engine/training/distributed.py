"""Several processes that learn one prompt (`torchrun`): who this one is, and means over all of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from ebr_engine import settings
from ebr_engine.backbones.sharding import WHOLE, Ulysses, Whole
from ebr_engine.errors import EbrError


@dataclass(frozen=True)
class World:
    """The processes of a run: this one's place among `size`."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def exchange(self, heads: int) -> Whole | Ulysses:
        """With the other processes, which share the tokens of a transformer of so many heads; `EbrError` where they cannot."""
        if self.size == 1:
            return WHOLE
        if heads % self.size:
            raise EbrError(f"{heads} heads cannot be shared evenly by {self.size} processes")
        return Ulysses(self.rank, self.size, distributed.group.WORLD.group_name)

    def mean(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over all processes: one message for all of them."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        distributed.all_reduce(flat)
        for tensor, part in zip(tensors, (flat / self.size).split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            distributed.barrier()


@contextmanager
def joined(device: str) -> Iterator[tuple[World, str]]:
    """The world of this process and its device; with `torchrun` one of several, otherwise alone.

    On CUDA (`auto`, `cuda`) each process takes the device of its local rank and NCCL; on a CPU gloo.
    """
    rank, local_rank, size = settings.process()
    if size == 1:
        yield World(), device
        return
    if device in ("auto", "cuda") and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise EbrError(f"process {local_rank} of this machine has no device: there are {torch.cuda.device_count()}")
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(local_rank)
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo", rank=rank, world_size=size)
    try:
        yield World(rank, size), device
    finally:
        distributed.destroy_process_group()
