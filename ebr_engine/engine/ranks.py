"""The processes of a run over several devices: started, joined, told what to do, and missed when they end.

Rank 0 is the process that was called. It starts the others and gives each a pipe as its input: a rank whose pipe is closed has
lost rank 0, and leaves. `torchrun` starts and watches all of them instead. Orders are JSON and tensors, never pickles.
"""

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import IO, Any

import torch
from torch import Tensor, distributed

from ebr_engine import settings
from ebr_engine.backbones.sharding import Ulysses
from ebr_engine.engine.devices import choose_device
from ebr_engine.errors import DeviceLost, EngineError, warn

TORCHRUN = "torchrun"  # in place of devices: its processes have one each
LEFT = "rank 0 has left"
FOREVER = timedelta(days=3650)  # a rank waits for orders as long as rank 0 has none
LOOK = 0.1  # seconds between two looks at the other processes
LAST_WORDS = 5.0  # seconds in which a process that has dropped its connection ends


def devices_of(devices: str | None, device: str) -> list[str]:
    """The devices of a run: those of a list with commas, each checked; of `torchrun` this process's; one where none are named.

    Raises `EngineError` for a device that is not there, twice there, or of another kind than the others.
    """
    if not devices:
        return [device]
    if devices == TORCHRUN and device in ("auto", "cpu", "cuda"):
        local = settings.process()[1]
        return [f"cuda:{local}" if torch.cuda.is_available() and device != "cpu" else "cpu"]
    if device != "auto":
        raise EngineError(f"devices {devices} and device {device} contradict each other; leave device out")
    chosen = [choose_device(name.strip()) for name in devices.split(",")]
    names = [str(torch.device("cuda", one.index or 0)) if one.type == "cuda" else "cpu" for one in chosen]
    if len({one.type for one in chosen}) > 1:
        raise EngineError(f"devices {devices}: all of them are CUDA devices, or all are cpu")
    if chosen[0].type == "cuda" and len(set(names)) < len(names):
        raise EngineError(f"devices {devices}: no device can be named twice")
    return names


class Rank:
    """Another process of this run, which this one has started."""

    def __init__(self, number: int, device: str, about: dict[str, Any]):
        self.number, self.device = number, device
        self._errors: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed by `leave`)
        command = [sys.executable, "-m", "ebr_engine.engine.parallel", json.dumps(about | {"rank": number, "device": device})]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._errors)

    @property
    def code(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.poll()

    @property
    def failed(self) -> bool:
        """Whether it has ended as no rank should."""
        return self.code not in (None, 0)

    def words(self) -> str:
        """How it has ended, in one line."""
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        code = self.code or 0
        end = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        return f"rank {self.number} on {self.device} has ended ({end}){': ' + lines[-1] if lines and code > 0 else ''}"

    def leave(self, seconds: float) -> None:
        """Wait for its end, and bring it about where it does not come."""
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


class Ranks:
    """This process's place among those of a run.

    `rank` of `world`, its `device`; `store`: where they meet; `others`: those that it has started.
    """

    def __init__(self, rank: int, world: int, device: str, store: Any, others: Sequence[Rank] = ()):
        self.rank, self.world, self.device, self.others = rank, world, torch.device(device), list(others)
        self._store = store
        self.size = world  # of them, that compute
        self.exchange: Ulysses | None = None
        self._group: Any = None
        self._ended = ""
        if rank == 0:
            atexit.register(self.end)
            threading.Thread(target=self._watch, daemon=True).start()

    @property
    def leads(self) -> bool:
        """Whether this process tells the others what to do."""
        return self.rank == 0

    @property
    def idle(self) -> bool:
        """Whether this one has nothing to compute."""
        return self.rank >= self.size

    def join(self, heads: int) -> None:
        """Meet the others, each of which has loaded a model with so many heads: as many ranks compute as divide them.

        Raises `DeviceLost` where one of them has ended instead.
        """
        self._store.set(f"ready {self.rank}", "")
        self._meet()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        backends = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        distributed.init_process_group(backends, timeout=FOREVER, store=self._store, rank=self.rank, world_size=self.world)
        self.size = max(size for size in range(1, self.world + 1) if heads % size == 0)
        if self.leads and self.size < self.world:
            idle = self.world - self.size
            warn(f"{heads} heads cannot be shared evenly by {self.world} devices: {self.size} compute, {idle} stay idle")
        self._group = distributed.new_group(list(range(self.size)), timeout=FOREVER)
        if not self.idle:
            self.exchange = Ulysses(self.rank, self.size, self._group.group_name)

    def _meet(self) -> None:
        """Until all ranks are ready. One that follows leaves if rank 0 finds nothing to do."""
        waited = [f"ready {rank}" for rank in range(self.world)]
        while not self._store.check(waited):
            if not self.leads and self._store.check([LEFT]):
                raise SystemExit
            if any(one.failed for one in self.others):
                self.lose()
            time.sleep(LOOK)

    def tell(self, order: dict[str, Any], tensors: Sequence[Tensor] = ()) -> None:
        """Give the other ranks an order, with tensors; `DeviceLost` where one of them has ended."""
        self.check()
        shapes = [(list(x.shape), str(x.dtype).removeprefix("torch.")) for x in tensors]
        words = torch.frombuffer(bytearray(json.dumps([order, shapes]).encode()), dtype=torch.uint8)
        whole = (x.to(self.device).contiguous().flatten().view(torch.uint8) for x in tensors)
        try:
            for message in (torch.tensor([len(words)]), words, *whole):
                self._send(message)
        except RuntimeError as error:
            self._blame(error)
            raise

    def hear(self) -> tuple[dict[str, Any], list[Tensor]]:
        """The next order, with its tensors on this rank's device."""
        length = self._send(torch.zeros(1, dtype=torch.int64))
        order, shapes = json.loads(bytes(self._send(torch.empty(int(length), dtype=torch.uint8)).tolist()))
        tensors = []
        for shape, name in shapes:
            x = torch.empty(shape, dtype=getattr(torch, name), device=self.device)
            self._send(x.view(-1).view(torch.uint8))
            tensors.append(x)
        return order, tensors

    def word(self, number: int = 0) -> int:
        """One small number, the same on all ranks: rank 0's."""
        return int(self._send(torch.tensor([number])))

    def _send(self, x: Tensor) -> Tensor:
        if x.numel():
            distributed.broadcast(x, 0, self._group)
        return x

    def together(self, work: Callable[[], Any]) -> Any:
        """Do what all ranks do at the same time; where that fails the others cannot go on.

        Raises `DeviceLost` where it fails because one of them has ended.
        """
        try:
            result = work()
        except Stopped:
            raise
        except BaseException as error:
            if self.leads and isinstance(error, RuntimeError):
                self._blame(error)
            self._ended = f"{type(error).__name__} in another run"
            raise
        self.check()
        return result

    def _blame(self, error: RuntimeError) -> None:
        """`DeviceLost` if a rank's end may be why there was an error."""
        dropped = isinstance(error, torch.distributed.DistError) or any(
            word in str(error) for word in ("gloo", "NCCL", "onnection")
        )
        until = time.monotonic() + LAST_WORDS
        while dropped and not any(one.failed for one in self.others) and time.monotonic() < until and self.others:
            time.sleep(LOOK)
        if any(one.failed for one in self.others):
            self.lose()
        if dropped:
            self._ended = "another rank has ended"
            raise DeviceLost(f"{self._ended}, and the run with it") from error

    def lose(self) -> None:
        """`DeviceLost`: a rank has ended."""
        lost = next(one for one in self.others if one.failed)
        self._ended = lost.words()
        raise DeviceLost(f"{self._ended}; the run ends with it")

    def check(self) -> None:
        """`DeviceLost` unless all ranks are at work."""
        if any(one.failed for one in self.others):
            self.lose()
        if self._ended:
            raise DeviceLost(f"the devices work together no more: {self._ended}")

    def _watch(self) -> None:
        """A CUDA device that waits for a rank that has ended waits for ever: its collectives are given up."""
        while not any(one.failed for one in self.others) and not self._ended:
            time.sleep(LOOK)
        if self.device.type == "cuda" and self._group is not None and any(one.failed for one in self.others):
            with suppress(Exception):  # whatever it says, the run ends
                self._group._get_backend(self.device).abort()

    def end(self) -> None:
        """Let the other ranks go; nothing can be run any more."""
        atexit.unregister(self.end)
        orderly = not self._ended and self._group is not None and not any(one.failed for one in self.others)
        if orderly and self.leads:
            with suppress(Exception):  # one that has just ended
                self.tell({"do": "leave"})
        self._ended = self._ended or "it was closed"
        for one in self.others:
            one.leave(LAST_WORDS if orderly else 0)
        self.others = []
        if distributed.is_initialized() and self._group is not None:
            with suppress(Exception):
                distributed.destroy_process_group()
        self._group = None


class Stopped(BaseException):
    """Rank 0 was asked to stop in the middle of a run, and all ranks have stopped."""


def start(devices: str, names: Sequence[str], about: dict[str, Any]) -> Ranks:
    """Rank 0 of a run on devices `names`; `about`: what the others have to know, as JSON has it.

    With `torchrun` the others are there, and know. Raises `EngineError` where this process has ranks already.
    """
    if distributed.is_initialized():
        raise EngineError("this process has a group of processes already; close what has several devices first")
    if devices == TORCHRUN:
        rank, _, size = settings.process()
        return Ranks(rank, size, names[0], torchrun_store())
    store = distributed.TCPStore("127.0.0.1", 0, None, True, FOREVER, wait_for_workers=False)
    share_cores(names)
    about = about | {"port": store.port, "world": len(names)}
    others = [Rank(number, name, about) for number, name in enumerate(names) if number]
    return Ranks(0, len(names), names[0], store, others)


@functools.cache
def torchrun_store() -> Any:
    """Where `torchrun`'s processes meet. When rank 0 ends, those that still wait for it leave."""
    store, rank, _ = next(distributed.rendezvous("env://", timeout=FOREVER))
    if rank == 0:
        atexit.register(store.set, LEFT, "")
    return store


def started(place: dict[str, Any]) -> Ranks:
    """A rank that another process has started: it leaves when that one ends, and does not hear Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def leave_with_rank_0() -> None:
        os.read(0, 1)  # ends with the pipe
        os._exit(0)

    threading.Thread(target=leave_with_rank_0, daemon=True).start()
    share_cores(["cpu"] * place["world"] if place["device"] == "cpu" else ())
    store = distributed.TCPStore("127.0.0.1", place["port"], None, False, FOREVER)
    return Ranks(place["rank"], place["world"], place["device"], store)


def share_cores(names: Sequence[str]) -> None:
    """Processes that compute on one CPU have a share of its cores each."""
    if len(names) > 1 and names[0] == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // len(names)))
