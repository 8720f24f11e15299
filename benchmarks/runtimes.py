"""`python -m benchmarks.peers --runtimes`: the engine beside OpenVINO and ONNX Runtime on the graph that it exports.

One evaluation of the transformer on a CPU: `mini` at 256 x 256 and 512 x 512 pixels, and four blocks of Wan 1.3B's width. Every
runtime is a process of its own, so that none meets another's threads or memory; they take turns, one evaluation each a round.
A process times its own evaluation, by the clock and by the CPU time of all its threads. CPU time is what is compared: another
program that uses the machine adds little to it. Every result is compared with the same evaluation in float64.

The precision is the same for all in a comparison: OpenVINO is told it, and ONNX Runtime, which has no bf16 on a CPU, is left
out of bf16.
"""

import multiprocessing
import os
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import relative_rms
from benchmarks.models import PRECISIONS, random_model, work_of
from benchmarks.report import columns, cpu_instructions, spread, version
from benchmarks.steps import load_task
from ebr_engine.backbones.base import Backbone
from ebr_engine.backbones.layers import Int8Linear, cpu_has_bf16, pack_trunk, quantize_trunk
from ebr_engine.backbones.mini.model import load_mini
from ebr_engine.backbones.mini.spec import SPEC
from ebr_engine.bridge.sampler import make_table
from ebr_engine.engine.execute import compile_trunk
from ebr_engine.errors import EngineError
from ebr_engine.export.graph import ExportedTrunk, Graph, Runner, rotary_grid, token_grid
from ebr_engine.export.onnx import write_onnx
from ebr_engine.export.onnx_runtime import OnnxRunner

TASK, PHOTO = "rain", "coffee"
CASES = {
    "mini-256": "mini with its rain prompt, a photo of 256 x 256",
    "mini-512": "mini with its rain prompt, a photo of 512 x 512",
    "wan-width": "four blocks of Wan 1.3B's width, random weights, 1280 tokens",
}
SIDES = {"mini-256": 256, "mini-512": 512}
WAN_LATENT = (16, 5, 32, 32)
WARM = 2  # evaluations before the clock counts
COMPILED, INT8 = "ours, compiled", "ours, int8"
EBR_KERNELS = {
    "ours": "auto",
    COMPILED: "auto",
    INT8: "auto",
    "ours, plain torch": "torch",
}  # what the engine's forms are run with
# What holds libraries to older instructions, and is told in a result.
HELD = ("EBR_CPU_LEVEL", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
INSTALL = "pip install 'ebr-engine[runtimes]'"


@dataclass(frozen=True)
class Evaluation:
    """A transformer and what one evaluation of it reads."""

    trunk: torch.nn.Module
    latent: Tensor  # [1, C, F, H, W] float32
    step: Any


def evaluation(case: str, dtype: torch.dtype, quick: bool) -> Evaluation:
    """A case in a dtype; the same numbers in every process. `quick`: tiny."""
    if case in SIDES:
        mini = load_mini(dtype=dtype)
        task = load_task(mini, TASK, [PHOTO], 32 if quick else SIDES[case])
        halves, text = (mini.conditioner, mini.trunk), {"context": mini.context}
        backbone, latent = Backbone(SPEC, *halves, mini.codec, text, torch.device("cpu"), dtype), task.degraded
        prompt, t0 = (task.prompt.residual, task.prompt.alpha), task.prompt.t0
    else:
        work = work_of(case, quick)
        model = random_model(work if quick else replace(work, latent=WAN_LATENT), "cpu", dtype)
        backbone, latent, prompt, t0 = model.backbone(), model.degraded, model.prompt, model.t0
    with torch.no_grad():
        tables = backbone.bake(torch.tensor(make_table("fast", t0).times[:1]) * 1000, [prompt])
    return Evaluation(backbone.trunk, latent.float(), tables[0])


def ours(case: str, dtype: torch.dtype, quick: bool, form: str) -> Callable[[], Tensor]:
    """The engine's transformer as a run has it: weights packed, compiled or in int8 on request."""
    one = evaluation(case, dtype, quick)
    if form == INT8:
        quantize_trunk(one.trunk, Int8Linear)
    pack_trunk(one.trunk)
    trunk = compile_trunk(one.trunk) if form == COMPILED else one.trunk
    return lambda: trunk(one.latent, one.step)


def graph_inputs(path: Path) -> dict[str, Tensor]:
    """What the graph at `path` is given, as `prepare` left it."""
    return torch.load(path.with_suffix(".inputs"), weights_only=True)


def onnx_runtime(path: Path, dtype: torch.dtype) -> Runner:
    """ONNX Runtime over torch's memory."""
    return OnnxRunner(path, torch.device("cpu"))


def openvino(path: Path, dtype: torch.dtype) -> Runner:
    """OpenVINO's CPU plugin in the precision that is compared, with as many threads as torch has."""
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    names = {name for entry in request.model_inputs for name in entry.names}

    def run(inputs: dict[str, Tensor]) -> Tensor:
        given = {name: value.float().contiguous().numpy() for name, value in inputs.items() if name in names}
        return torch.from_numpy(next(iter(request.infer(given, share_inputs=True).values())).copy())

    return run


RUNTIMES = {"OpenVINO": openvino, "ONNX Runtime": onnx_runtime}


def work(connection: Connection, runtime: str, case: str, precision: str, graph: Path, quick: bool) -> None:
    """A runtime's process: prepare, send the result, then send wall and CPU seconds for each request until there are none."""
    dtype = PRECISIONS[precision]
    with torch.inference_mode():
        if runtime in RUNTIMES:
            runner, inputs = RUNTIMES[runtime](graph, dtype), graph_inputs(graph)
            run = lambda: runner(inputs)  # noqa: E731
        else:
            run = ours(case, dtype, quick, runtime)
        for _ in range(WARM):
            result = run()
        connection.send(result.float())
        while connection.recv():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            connection.send((time.perf_counter() - wall, time.process_time() - cpu))


def exported(name: str, trunk: Any, step: Any, latent: tuple[int, ...], dtype: torch.dtype, folder: Path) -> ExportedTrunk:
    """A transformer's graph, for latents of one size, run by a runtime in this process; `EngineError` where it cannot be."""
    path = folder / "trunk.onnx"
    if not path.exists():
        write_onnx(path, trunk, step, latent)
    if name == "OpenVINO" and find_spec("openvino") is None:
        raise EngineError(f"is not installed: {INSTALL}")
    return ExportedTrunk(RUNTIMES[name](path, dtype), trunk.config, Graph("onnx", "float32", latent, None))


@contextmanager
def environment(**values: str):
    """Variables that processes which are started within have."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    yield
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


class Process:
    """A runtime at work in a process of its own."""

    def __init__(self, runtime: str, case: str, precision: str, graph: Path, quick: bool):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, runtime, case, precision, graph, quick), daemon=True)
        with environment(EBR_KERNELS=EBR_KERNELS.get(runtime, "torch")):
            self.process.start()
        theirs.close()  # so that the death of the other end is the end of the file here

    def answer(self) -> Any:
        """What it sent; `RuntimeError` if it died, having said why."""
        try:
            return self.connection.recv()
        except EOFError as error:
            self.process.join()
            raise RuntimeError(f"its process ended with {self.process.exitcode}") from error

    def evaluate(self) -> tuple[float, float]:
        """Wall and CPU seconds of one evaluation."""
        self.connection.send(True)
        return self.answer()

    def end(self) -> None:
        self.connection.send(False)
        self.process.join()


def prepare(case: str, dtype: torch.dtype, folder: Path, quick: bool) -> tuple[Path, Tensor]:
    """Write the case's graph and its inputs; the graph's path, and the exact velocity: in float64, of weights in `dtype`."""
    with torch.no_grad():
        one = evaluation(case, torch.float32, quick)
        path = folder / f"{case}.onnx"
        if not path.exists():
            write_onnx(path, one.trunk, one.step, tuple(one.latent.shape[1:]))
            tables = rotary_grid(one.trunk.config, token_grid(one.trunk.config, one.latent.shape))
            inputs = {"latent": one.latent, **dict(zip(("cos", "sin"), tables)), **one.step._asdict()}
            torch.save({name: value.contiguous() for name, value in inputs.items()}, path.with_suffix(".inputs"))
        exact = evaluation(case, dtype, quick)
        step = type(exact.step)(*(table.double() for table in exact.step))
        return path, exact.trunk.double()(exact.latent.double(), step).double()


def compare(case: str, precision: str, options: Namespace, folder: Path) -> dict[str, Any]:
    """All runtimes on one case in one precision, in turns."""
    names = list(options.runtime or (*EBR_KERNELS, *RUNTIMES))
    skipped = {}
    if (options.quick or options.no_compile) and COMPILED in names:
        names.remove(COMPILED)
    if not options.runtime and (case in SIDES or precision != "fp32"):  # int8 is for wide layers
        names.remove(INT8)
    if precision == "bf16" and "ONNX Runtime" in names:
        names.remove("ONNX Runtime")
        skipped["ONNX Runtime"] = "has no bf16 on a CPU"
    if "OpenVINO" in names and find_spec("openvino") is None:
        names.remove("OpenVINO")
        skipped["OpenVINO"] = f"is not installed: {INSTALL}"
    graph, exact = prepare(case, PRECISIONS[precision], folder, options.quick)
    processes, errors = {}, {}
    for name in names:
        process = Process(name, case, precision, graph, options.quick)
        try:
            errors[name] = relative_rms(process.answer(), exact)
        except RuntimeError as error:
            skipped[name] = str(error)
            continue
        processes[name] = process
        print(f"{case}, {precision}: {name}", flush=True)
    rounds = 1 if options.quick else options.rounds
    taken = {name: [] for name in processes}
    for _ in range(rounds):
        for name, process in processes.items():
            taken[name].append(process.evaluate())
    for process in processes.values():
        process.end()
    rows = [
        {
            "runtime": name,
            "cpu_seconds": spread([cpu for _, cpu in times]),
            "wall_seconds": spread([wall for wall, _ in times]),
            "error": errors[name],
        }
        for name, times in taken.items()
    ]
    return {"case": case, "precision": precision, "rows": rows, "skipped": skipped}


def measure(options: Namespace) -> dict[str, Any]:
    """Every case in float32, and in bf16 where this CPU multiplies it."""
    precisions = [options.precision] if options.precision else ["fp32", *(["bf16"] if cpu_has_bf16() else [])]
    with tempfile.TemporaryDirectory() as folder:
        names = options.case or CASES
        cases = [compare(case, precision, options, Path(folder)) for case in names for precision in precisions]
    versions = {name: version(name) for name in ("openvino", "onnxruntime", "onnx")}
    held = {name: os.environ[name] for name in HELD if name in os.environ}
    return {"runtimes": cases, "instructions": cpu_instructions(), "held to": held, "versions": versions}


def table(result: dict[str, Any]) -> str:
    """What a person reads: medians, and how many times as fast as each the engine is."""
    tables = []
    for case in result["runtimes"]:
        mine = next((row["cpu_seconds"]["median"] for row in case["rows"] if row["runtime"] == "ours"), None)
        header = ["runtime", "CPU ms", "quartiles", "wall ms", "ours is faster by", "error"]
        rows = []
        for row in case["rows"]:
            low, high = (f"{value * 1e3:.0f}" for value in row["cpu_seconds"]["quartiles"])
            median, wall = (row[name]["median"] for name in ("cpu_seconds", "wall_seconds"))
            faster = "" if mine is None else f"x{median / mine:.2f}"
            error = "not finite" if row["error"] is None else f"{row['error']:.1e}"
            rows.append([row["runtime"], f"{median * 1e3:.1f}", f"{low} to {high}", f"{wall * 1e3:.1f}", faster, error])
        rounds = len(case["rows"][0]["cpu_seconds"]["all"]) if case["rows"] else 0
        title = f"{case['case']}: {CASES[case['case']]}; {case['precision']}, {rounds} rounds"
        skipped = [f"skipped {name}: {reason}" for name, reason in case["skipped"].items()]
        tables.append("\n".join([title, "", columns(header, rows), *skipped]))
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number)
    held = "".join(f", {name}={value}" for name, value in result.get("held to", {}).items())
    return "\n\n".join([*tables, f"instructions: {' '.join(result['instructions'])}{held}\n{versions}"])
