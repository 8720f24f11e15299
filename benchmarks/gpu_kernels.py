"""The GPU check's sections on operations: the build, correctness, times, attention, the table of linear layers, the tests."""

import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.clock import Run, ceilings, milliseconds, relative_rms
from benchmarks.gpu_cases import EXTENDED, Case, bytes_moved, cases, leaves
from benchmarks.gpu_sizes import MODELS, ODD, SMALL, Draw, Sizes, layers, linear_inputs, persistent, sizes
from benchmarks.gpus import Gpu
from benchmarks.report import ROOT, write_json
from benchmarks.roofline import FLUX_TEXT
from ebr_engine.kernels import backend, scaled_linear, scaled_linear_persistent
from ebr_engine.kernels.quantize_fp8 import quantize_fp8

# Twice the error of plain torch is allowed; a float32 result is a handful of roundings in another order, so it has this much.
FLOAT32 = 16 * torch.finfo(torch.float32).eps
COMPILE_SECONDS = 12  # what torch.compile of a small formula takes at most, the first one's start of its workers included


def build(run: Run) -> None:
    """The CUDA extension, in place, for this device."""
    if run.device.type != "cuda":
        run.add(step="csrc", result="not built: there is no CUDA device")
        return
    if shutil.which("nvcc") is None and not os.environ.get("CUDA_HOME"):
        run.add(step="csrc", result="not built: there is no nvcc on PATH; Triton's kernels serve every operation")
        return
    major, minor = torch.cuda.get_device_capability(run.device)
    arch = "90a" if (major, minor) == (9, 0) else f"{major}{minor}"
    environment = os.environ | {"EBR_BUILD_CUDA": "1", "EBR_CUDA_ARCHS": arch}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        run.add(step="csrc", arch=f"sm_{arch}", error=" ".join(done.stderr.split())[-600:])
    else:
        run.add(step="csrc", arch=f"sm_{arch}", result="built in place")


def served(run: Run, operation: str) -> str:
    """Which implementation answers for an operation in this process."""
    probe = torch.empty(0, device=run.device)
    if operation in EXTENDED and backend.extension():
        return "cuda"
    return "triton" if backend.registered(probe) and backend.launches(probe) else "torch"


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that what no kernel writes is seen; torch does it in its deterministic mode."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")  # of what has no such form
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def kernels(run: Run, only: tuple[str, ...] = ()) -> None:
    """Every operation and its gradients on the device against the formula in float64."""
    models = [] if run.tiny else [sizes(name, tokens=517, batch=2) for name in MODELS]
    every = [*((s, torch.bfloat16) for s in (*models[:2], ODD, *models[2:], SMALL)), (ODD, torch.float32), (SMALL, torch.float32)]
    for s, dtype in every:
        about = {"sizes": s.name, "dtype": str(dtype).removeprefix("torch.")}
        for make in cases(s, run.device, dtype):
            with run.guarded(**about), poisoned():
                for case in make():
                    if (not only or case.operation in only) and run.left(1, operation=case.name, **about):
                        with run.guarded(operation=case.name, **about):
                            for row in compared(case):
                                run.add(operation=case.name, **about, by=served(run, case.operation), **row)


def compared(case: Case) -> Iterator[dict[str, Any]]:
    """Rows of a case: the error of each output and gradient, and that of plain torch at the same precision."""
    torch.manual_seed(0)
    ours = with_gradients(case.function, case.inputs, case.learned)
    plain = with_gradients(case.reference, case.inputs, case.learned)
    wide = {name: value.double() if floating(value) else value for name, value in case.inputs.items()}
    truth = with_gradients(case.exact or case.reference, wide, case.learned)
    if len(ours) != len(truth):
        raise AssertionError(f"{len(ours)} results, {len(truth)} expected")
    names = [*(f"output {i}" for i in range(len(ours) - len(case.learned))), *(f"gradient of {name}" for name in case.learned)]
    for name, value, other, expected in zip(names, ours, plain, truth):
        error, plainly = relative_rms(value, expected), relative_rms(other, expected)
        yield {"result": name, "error": error, "plain": plainly, "ok": error is not None and error <= max(2 * plainly, FLOAT32)}
    if case.bits:
        values, scale = case.function(**case.inputs)
        same = case.reference(**{name: value.cpu() for name, value in case.inputs.items()})
        pairs = ((scale.cpu(), same.scale), (values.cpu().view(torch.uint8), same.values.view(torch.uint8)))
        equal = all(torch.equal(*pair) for pair in pairs)
        yield {"result": "bits, against a CPU's", "error": 0.0 if equal else 1.0, "plain": 0.0, "ok": equal}


def floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def with_gradients(function: Callable[..., Any], inputs: dict[str, Any], learned: tuple[str, ...]) -> list[Tensor]:
    """The results of a function, then the gradients of its learned inputs for one fixed random pull, by their precision."""
    given = {k: v.detach().requires_grad_(k in learned) if floating(v) else v for k, v in inputs.items()}
    results = leaves(function(**given))
    if not learned:
        return results
    generator = torch.Generator().manual_seed(1)
    pulls = [torch.randn(x.shape, generator=generator).to(torch.bfloat16).to(x) for x in results]
    return [*results, *torch.autograd.grad(results, [given[name] for name in learned], pulls)]


def ops(run: Run, only: tuple[str, ...] = ()) -> None:
    """Each operation at the models' sizes: ours, plain, compiled, the library's; rates, and the share of the floor."""
    best = ceilings(run.device)
    run.add(operation="ceilings", bandwidth=best.bandwidth, bf16=best.bf16, fp8=best.fp8, source=best.source)
    for s in [SMALL, ODD] if run.tiny else [sizes(name) for name in MODELS]:
        compile_too = not only and s.name != MODELS[-1]  # the compiler's time is better spent on other shapes
        for make in cases(s, run.device, torch.bfloat16):
            with run.guarded(sizes=s.name):
                for case in make():
                    asked = case.operation in only if only else case.operation != "scaled_linear"  # it has its own section
                    if asked and run.left(1, operation=case.name, sizes=s.name):
                        with run.guarded(operation=case.name, sizes=s.name):
                            run.add(**timed(run, case, s, best, compile_too))
                            run.leave_if_lost()


@torch.no_grad()
def timed(run: Run, case: Case, s: Sizes, best: Gpu, compile_too: bool) -> dict[str, Any]:
    """The row of one case; a form that fails is left out, with its reason."""
    row: dict[str, Any] = {"operation": case.name, "sizes": s.name, "by": served(run, case.operation)}

    def measure(name: str, function: Callable[..., Any]) -> float | None:
        try:
            function(**case.inputs)
            found = milliseconds(lambda: function(**case.inputs), run.device)
        except Exception as error:  # a library that cannot, a compiler that is missing
            row[f"{name} failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:200]
            return None
        row[f"{name} ms"] = found["median"]
        if name == "ours":
            row["quartiles"] = found["quartiles"]
        return found["median"]

    ours = measure("ours", case.function)
    scores = case.operation == "attention"  # whose plain form keeps a number for every pair of tokens
    eager = None if scores else measure("plain", case.reference)
    others = {name: measure("library", function) for name, function in case.library.items()}
    if compile_too and not scores and run.left(COMPILE_SECONDS, operation=f"{case.name}, compiled", sizes=s.name):
        torch.compiler.reset()
        measure("compiled", torch.compile(case.reference, dynamic=False, backend="eager" if run.tiny else "inductor"))
    if ours is not None:
        moved = bytes_moved(case, case.function(**case.inputs))
        floor = max(case.flop / best.bf16, moved / best.bandwidth) / 1e9
        row |= {"GB/s": moved / ours / 1e6, "floor ms": floor, "share": floor / ours}
        row |= {"TFLOP/s": case.flop / ours / 1e9} if case.flop else {}
        row |= {"x plain": eager / ours} if eager else {}
        for name, library in others.items():
            row |= {"x library": library / ours, "library": name} if library else {}
    return row


def forms_of_attention(run: Run) -> None:
    """Self-attention in every form that there is, in full: errors, then times, one beside the other and beside the library's."""
    kernels(run, ("attention",))
    ops(run, ("attention",))


def linears(run: Run) -> None:
    """The blocks' linear layers in bf16 and e4m3 by every implementation; which is fastest goes to a table for `kernels/`."""
    if run.device.type == "cuda" and not backend.has_fp8(run.device):
        run.add(layer="all", error="left out: this device does not multiply e4m3")
        return
    best, choices = ceilings(run.device), {}
    for s in [SMALL] if run.tiny else [sizes(name) for name in MODELS]:
        rows = [FLUX_TEXT, s.tokens - FLUX_TEXT, s.tokens] if s.per_head and not run.tiny else [s.tokens]
        for layer, (k, n) in layers(s).items():
            for m in rows:
                about = {"sizes": s.name, "layer": layer, "m": m, "k": k, "n": n}
                if run.left(1, **about):
                    with run.guarded(**about), torch.no_grad():
                        found = timed_linear(run, m, k, n, layer == "up", best)
                        run.add(**about, **found)
                        run.leave_if_lost()
                        ending = scaled_linear.epilogue(*[layer == "up"] * 2)
                        choices[1 << (m - 1).bit_length(), k, n, ending] = found["fastest"]
    name = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "cpu"
    file = run.out / f"scaled_linear_{re.sub('[^a-z0-9]+', '_', name.lower()).strip('_')}.json"
    keys = ("rows", "k", "n", "epilogue", "implementation")
    write_json(file, {"device": name, "choices": [dict(zip(keys, (*where, fastest))) for where, fastest in choices.items()]})
    run.add(written=str(file), use="copy it to kernels/")


def timed_linear(run: Run, m: int, k: int, n: int, gelu: bool, best: Gpu) -> dict[str, Any]:
    """The row of one layer at one number of rows; with `gelu` it ends in GELU, in e4m3 quantised for the next layer too."""
    given = linear_inputs(m, k, n, Draw(run.device, torch.bfloat16))
    values, scale, weight, weight_scale, bias = given.values()
    wide_x, wide_weight = (values.float() * scale).bfloat16(), (weight.float() * weight_scale).bfloat16()
    bound = scaled_linear.bound_ref(weight, weight_scale, bias) if gelu else None
    dtype = torch.float8_e4m3fn if gelu else torch.bfloat16

    def activated(y: Tensor) -> Tensor:
        return F.gelu(y, approximate="tanh") if gelu else y

    def library() -> Any:
        y = activated(scaled_linear.library_product(*given.values()))
        return quantize_fp8(y) if gelu else y

    forms = {
        "bf16": lambda: activated(F.linear(wide_x, wide_weight, bias)),
        "library": library,
    }
    for form in ("tiles", *(scaled_linear_persistent.FORMS if persistent(run.device) else ())):
        forms[form] = lambda form=form: scaled_linear.scaled_linear_launch(*given.values(), bound, gelu, dtype, form)
    eight_bits = [name for name in forms if name != "bf16"]
    if run.tiny:  # a CPU has none
        forms |= dict.fromkeys(eight_bits, lambda: scaled_linear.scaled_linear_ref(*given.values(), gelu, torch.bfloat16))
    times: dict[str, float] = {}
    for name, function in forms.items():
        try:
            function()
            times[name] = milliseconds(function, run.device)["median"]
        except Exception as error:  # one that cannot leaves the other to be measured
            run.add(m=m, k=k, n=n, failed=f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[0]}"[:200])
    row: dict[str, Any] = {f"{name} ms": value for name, value in times.items()}
    fp8 = {name: times[name] for name in eight_bits if name in times}
    row["fastest"] = min(fp8, key=fp8.get, default="library")
    if fp8 and "bf16" in times:
        fastest, flop = min(fp8.values()), 2 * m * k * n
        row |= {"TFLOP/s": flop / fastest / 1e9, "x bf16": times["bf16"] / fastest}
        row |= {"share": flop / best.fp8 / 1e9 / fastest} if best.fp8 else {}
    return row


def cuda(run: Run) -> None:
    """Correctness and times of what the extension has, in a process that asks for it."""
    if backend.extension() is None and not run.tiny:
        run.add(operation="csrc", error="the extension is not built (section build)")
        return
    kernels(run, EXTENDED)
    ops(run, EXTENDED)


def tests(run: Run) -> None:
    """The tests that are marked gpu; in this process, which finds the package where it is not installed."""
    import pytest

    class Counted:
        def __init__(self) -> None:
            self.outcomes: dict[str, int] = {}
            self.failures: list[str] = []

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                self.outcomes[f"tests {report.outcome}"] = self.outcomes.get(f"tests {report.outcome}", 0) + 1
            if report.failed:
                self.failures.append(report.nodeid)

    counted, folder = Counted(), "tests/kernels" if run.tiny else "tests"
    status = pytest.main(["-m", "gpu", "--tb=short", "-p", "no:cacheprovider", folder], plugins=[counted])
    run.add(**counted.outcomes, status=int(status))
    for test in counted.failures:
        run.add(test=test, error="failed")
