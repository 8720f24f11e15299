"""`ebr-engine bench`: how fast restoring is on this machine, on one screen."""

import time
from typing import Annotated, Any

import typer

from ebr_engine.cli.options import takes
from ebr_engine.request import RestoreRequest

COMPUTING = ("device", "precision", "fp8_attention", "offload", "compile")
HELP = {"task": "The prompt to restore with."}

LARGE = 0.9  # share of the time from which on only the transformer is worth looking at


@takes("task", "backbone", "model", "revision", "offline", "context", "vae", "engine", *COMPUTING, task="haze", help=HELP)
def bench(
    *,
    size: Annotated[int, typer.Option("--size", metavar="PIXELS", min=16, help="Side of the square picture.")] = 256,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Pictures in one run.")] = 1,
    runs: Annotated[int, typer.Option("--runs", metavar="N", min=1, help="After the first; medians are told.")] = 3,
    request: RestoreRequest,
) -> None:
    """Time the stages of restoring a picture here: what takes how long, at which rate, by which kernels.

    [bold]ebr-engine bench[/]

    [bold]ebr-engine bench --size 512 --batch 4 --compile on[/]
    """
    started = time.perf_counter()
    import torch

    from ebr_engine.engine.measure import measured
    from ebr_engine.engine.restorer import Restorer
    from ebr_engine.kernels import backend

    imports = time.perf_counter() - started
    started = time.perf_counter()
    restorer = Restorer.from_request(request)
    load = time.perf_counter() - started
    found = measured(restorer, None if request.engine else request.task, size, runs, batch)
    spec = restorer.backbone.spec
    what = f"{spec.chunk[0]} frames of sound" if spec.side else f"{size} x {size}"
    about = [
        f"{restorer.backbone.name}, {batch} x {what}, {found['steps']} evaluations",
        f"{dtype(restorer)} on {restorer.device}",
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {form(restorer)}",
        "kernels: " + ", ".join(f"{one.name} ({one.reason})" for one in backend.backends() if one.available),
    ]
    _show(about, {"import": imports, "load": load} | found, batch, "sounds" if spec.side else "pictures")


def dtype(restorer: Any) -> str:
    """The transformer's precision by name."""
    from ebr_engine.backbones.layers import has_fp8_attention
    from ebr_engine.engine.costs import precision

    trunk = restorer.trunk
    return precision(restorer.backbone) + (", fp8 attention" if hasattr(trunk, "modules") and has_fp8_attention(trunk) else "")


def form(restorer: Any) -> str:
    """How the transformer runs."""
    runner = restorer.runner
    parts = [*(["compiled"] if runner.compiled else []), *(["CUDA graphs"] if runner.graphs else [])]
    return " and ".join(parts) or "not compiled"


def slow(found: dict[str, Any]) -> str:
    """What most of a picture's time goes into, in a sentence."""
    name = max(("encode", "denoise", "decode"), key=found.get)
    share = found[name] / found["whole"]
    what = {"denoise": "the transformer", "encode": "encoding", "decode": "decoding"}[name]
    hint = "; fewer --steps, a smaller picture or a faster precision help, nothing else does" if share > LARGE else ""
    return f"{share:.0%} of a picture's time is {what}{hint if name == 'denoise' else ''}"


def _show(about: list[str], found: dict[str, Any], batch: int, things: str) -> None:
    from rich.console import Console
    from rich.table import Table

    once, each = ("import", "load", "bake"), ("encode", "denoise", "decode")
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    table.add_column()
    for name in once:
        table.add_row(name, f"{found[name] * 1e3:.0f} ms", "once")
    table.add_row("first run", f"{found['first'] * 1e3:.0f} ms", "with all that is compiled or set up in it")
    for name in each:
        share = found[name] / found["whole"]
        table.add_row(name, f"{found[name] * 1e3:.0f} ms", f"{'█' * round(share * 30)} {share:.0%}")
    table.add_row("[bold]whole[/]", f"[bold]{found['whole'] * 1e3:.0f} ms[/]", f"{batch / found['whole']:.3g} {things}/s")
    console = Console(highlight=False)
    console.print("\n".join(about) + "\n", markup=False)
    console.print(table)
    rate = "" if found["tflops"] != found["tflops"] else f"{found['tflops']:.3g} TFLOP/s in the transformer; "
    console.print(f"\n{rate}{slow(found)}", markup=False)
