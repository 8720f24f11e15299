"""`python -m benchmarks.parts`: where an evaluation's processor time goes on a CPU, by operation, beside large products.

The cases are those of `python -m benchmarks.peers --runtimes`, and `learning`: a step of a prompt on `mini`, of four crops of
128 x 128. Each operation's launcher is clocked by this thread's processor time, so run it with one thread
(`OMP_NUM_THREADS=1`); what is left is Python, and torch's smaller operations.
"""

import time
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import report, runtimes, training
from benchmarks.models import PRECISIONS, evaluation_flop
from benchmarks.report import Benchmark, columns, spread
from ebr_engine.backbones import layers
from ebr_engine.kernels import backend, packed_linear

NATIVE = ("attention", "prompt_attention", "norm", "qk_norm_rope", "gelu", "gelu_", "attention_saving", "attention_gradient")
NATIVE += ("prompt_attention_gradient", "norm_gradient", "qk_norm_rope_gradient", "gelu_gradient")
LEARNING, PRODUCTS = "learning", "packed products"
INSIDE = "inside"  # of any of them, so far
SIDE = 2048  # of the large product


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--case", nargs="+", choices=[*runtimes.CASES, LEARNING], default=["mini-256", "mini-512"])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="tiny: does it run?")


def measure(options: Namespace) -> dict[str, Any]:
    """Each operation's share of one evaluation, or step of learning."""
    if options.rounds < 1:
        options.error("--rounds must be at least 1")
    given = [(case, precision) for case in options.case for precision in options.precision]
    return {"parts": [taken(case, precision, options.rounds, options.quick) for case, precision in given]}


def step_of_learning(dtype: torch.dtype, quick: bool) -> Callable[[], Any]:
    """What a step of learning runs, once it is set up."""
    case = training.make_case("mini", torch.device("cpu"), dtype, quick)
    given, made = training.problem(case, training.BATCH["mini"]), training.learner(case, case.trunk)
    return lambda: training.stepped(made, given)


def an_evaluation(case: str, dtype: torch.dtype, quick: bool) -> tuple[Callable[[], Any], float]:
    """What an evaluation runs, and its operations."""
    one = runtimes.evaluation(case, dtype, quick)
    layers.pack_trunk(one.trunk)
    flop = evaluation_flop(one.trunk.config, one.latent.shape, one.step)
    return torch.inference_mode()(lambda: one.trunk(one.latent, one.step)), flop


def taken(case: str, precision: str, rounds: int, quick: bool) -> dict[str, Any]:
    """Processor seconds of an evaluation and, of each operation, those of all its calls; medians over the rounds."""
    dtype, spent = PRECISIONS[precision], defaultdict(float)
    run, flop = (step_of_learning(dtype, quick), None) if case == LEARNING else an_evaluation(case, dtype, quick)
    for _ in range(runtimes.WARM):
        run()
    found: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        launch = counted(packed_linear.packed_linear_launch, spent)
        stack.enter_context(patch.object(packed_linear, "packed_linear_launch", clocked(launch, PRODUCTS, spent)))
        if cpu := backend._native():
            for name in NATIVE:
                stack.enter_context(patch.object(cpu, name, clocked(getattr(cpu, name), name, spent)))
        for _ in range(rounds):
            spent.clear()
            started = time.thread_time()
            run()
            spent["whole"] = time.thread_time() - started
            for name, value in spent.items():
                found[name].append(value)
    found.pop(INSIDE, None)
    whole, products = found.pop("whole"), found.pop("flop of products", [0.0])
    return {
        **{"case": case, "precision": precision, "seconds": spread(whole), "gflop": None if flop is None else flop / 1e9},
        "gflop_of_products": products[0] / 1e9,
        "operations": {name: spread(values) for name, values in sorted(found.items(), key=lambda item: -sum(item[1]))},
        "product_gflop_per_second": product_rate(dtype, 64 if quick else SIDE) / 1e9,
    }


def clocked(function: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    """The function, whose time is its own: without that of clocked ones that it calls."""

    def call(*arguments: Any, **more: Any) -> Any:
        before, started = spent[INSIDE], time.thread_time()
        result = function(*arguments, **more)
        taken = time.thread_time() - started
        spent[name] += taken - (spent[INSIDE] - before)
        spent[INSIDE] = before + taken
        return result

    return call


def counted(launch: Callable[..., Any], spent: dict[str, float]) -> Callable[..., Any]:
    """Packed products, their operations counted."""

    def call(x: torch.Tensor, weight: Any, *more: Any) -> Any:
        spent["flop of products"] += 2 * x.shape[:-1].numel() * weight.tensor.numel()
        return launch(x, weight, *more)

    return call


def product_rate(dtype: torch.dtype, side: int) -> float:
    """Operations a second of processor time in a large packed product, the best of a few."""
    x, bias = torch.randn(side, side).to(dtype), torch.zeros(side, dtype=dtype)
    weight, best = layers.PackedWeight(torch.randn(side, side).to(dtype)), float("inf")
    for _ in range(5):
        started = time.thread_time()
        layers.packed_linear(x, weight, bias)
        best = min(best, time.thread_time() - started)
    return 2 * side**3 / max(best, 1e-9)


def table(result: dict[str, Any]) -> str:
    """What a person reads."""
    tables = []
    for part in result["parts"]:
        whole = part["seconds"]["median"]
        rows = [[name, f"{t['median'] * 1e3:.1f}", f"{t['median'] / whole:.0%}"] for name, t in part["operations"].items()]
        large, title = part["product_gflop_per_second"], f"{part['case']}, {part['precision']}: {whole * 1e3:.1f} ms"
        if part["gflop"] is None:
            rate = part["gflop_of_products"] / part["operations"][PRODUCTS]["median"]
            title += f", products at {rate:.0f} GFLOP/s"
        else:
            rate = part["gflop"] / whole
            title += f", {rate:.0f} GFLOP/s"
        title += f", {rate / large:.0%} of the {large:.0f} of a large product"
        tables.append("\n".join([title, "", columns(["operation", "ms", "share"], rows)]))
    return "\n\n".join(tables)


def main(arguments: Sequence[str] | None = None) -> None:
    """Clock the cases, and print a table each."""
    report.main("parts", __doc__, Benchmark(options, measure, table), arguments)


if __name__ == "__main__":
    main()
