"""The inside of `python -m benchmarks.speed latency`: a fresh process that restores a file and times its own stages.

What `ebr-engine restore` does with one photo or clip, with clocks around the engine's functions and the transformer.
"""

import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STAGES = ("import torch", "import engine", "load weights", "read", "bake", "encode", "denoise", "decode", "write")
SETTINGS = ("model", "context", "device", "precision", "compile")


def timed_stages(source: Path, out: Path, options: Namespace) -> dict[str, Any]:
    """Seconds a stage, each run of the transformer with its operations, and what the machine's products reach beside it."""
    seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    with clock(seconds, "import torch"):
        import torch  # noqa: F401
    with clock(seconds, "import engine"):
        from ebr_engine.engine.restorer import Restorer
    with clock(seconds, "load weights"):
        restorer = Restorer(options.backbone, **{name: getattr(options, name) for name in SETTINGS})

    from benchmarks.clock import peak_bytes, product_rate
    from benchmarks.models import evaluation_flop
    from ebr_engine.engine.measure import synchronise, watched

    transformer: list[dict[str, float]] = []

    def begin(trunk: Any, arguments: tuple) -> None:
        latent, tables = arguments
        flop = evaluation_flop(trunk.config, latent.shape, tables)
        synchronise(restorer.device)
        transformer.append({"seconds": -time.perf_counter(), "flop": flop})

    def end(*_: Any) -> None:
        synchronise(restorer.device)
        transformer[-1]["seconds"] += time.perf_counter()

    restorer.trunk.register_forward_pre_hook(begin)
    restorer.trunk.register_forward_hook(end)
    with clock(seconds, "read"):
        pixels, write = read(source, out)
    with watched(restorer) as seen, clock(seconds, "restore"):
        with clock(seconds, "bake"):
            plan = restorer.plan(options.task, steps=options.steps)
            synchronise(restorer.device)
        restored = restorer.run(pixels, plan)
    with clock(seconds, "write"):
        write(restored)
    seconds |= {name: sum(seen[name]) for name in ("encode", "decode")}
    seconds["denoise"] = sum(one["seconds"] for one in transformer)
    return {
        "seconds": seconds,
        "transformer": transformer,
        "product_rate": product_rate(restorer.device, restorer.dtype),
        "device": str(restorer.device),
        "dtype": str(restorer.dtype),
        "peak_bytes": peak_bytes(restorer.device),
    }


def read(source: Path, out: Path) -> tuple[Any, Any]:
    """Pixels [1, 3, F, H, W] of a photo or clip, and what writes such pixels."""
    import torch

    if source.suffix == ".mp4":
        from ebr_engine.media.video import open_video, write_video

        with open_video(source) as reader:
            frames = list(reader)

        def write(pixels: torch.Tensor) -> None:
            with write_video(out, reader) as writer:
                for frame, picture in zip(frames, pixels[0].permute(1, 2, 3, 0).numpy()):
                    writer.write(picture, frame)

        pictures = [frame.pixels for frame in frames]
    else:
        from ebr_engine.media.images import read_image, write_image
        from ebr_engine.media.picture import Picture

        picture = read_image(source)
        pictures = [picture.pixels]

        def write(pixels: torch.Tensor) -> None:
            write_image(out, Picture(**{**vars(picture), "pixels": pixels[0, :, 0].permute(1, 2, 0).numpy()}))

    return torch.stack([torch.tensor(one) for one in pictures], 0).permute(3, 0, 1, 2)[None], write


@contextmanager
def clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the time of the block to `seconds[name]`."""
    started = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
