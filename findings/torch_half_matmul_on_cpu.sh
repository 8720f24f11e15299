#!/bin/sh
# torch 2.13.0, CPU. A product of bf16 or fp16 matrices, on a CPU without instructions for that dtype, takes tens to hundreds of
# times as long as the same product by way of float32: torch neither converts nor warns, its fallback is a plain loop. oneDNN is
# held to AVX2 here, so that every x86-64 CPU behaves like one without the instructions. torch.optim.Muon orthogonalises its
# updates in bf16 whatever the parameters' dtype, so a step of float32 parameters meets it too.
. "$(dirname "$0")/run_with"
export ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1
run_with torch==2.13.0 numpy==2.4.6 <<'PYTHON'
import time

import torch

SIDE = 256


def seconds(function):
    """The least of a few runs."""
    taken = []
    for _ in range(4):
        started = time.perf_counter()
        function()
        taken.append(time.perf_counter() - started)
    return min(taken)


def muon_seconds():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(SIDE, SIDE)) for _ in range(2)]
    optimizer = torch.optim.Muon(parameters)
    for parameter in parameters:
        parameter.grad = torch.randn(SIDE, SIDE)
    return seconds(optimizer.step)


def orthogonalised(x, steps=5):
    """What Muon does with a gradient, in the dtype that it comes in."""
    x = x / x.norm(dim=(-2, -1), keepdim=True)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


print("torch", torch.__version__)
torch.manual_seed(0)
ratios = {}
for dtype in (torch.bfloat16, torch.float16):
    a = torch.randn(SIDE, SIDE).to(dtype)
    direct, converted = seconds(lambda: a @ a), seconds(lambda: (a.float() @ a.float()).to(dtype))
    error = ((a @ a).float() - (a.float() @ a.float()).to(dtype).float()).abs().max().item()
    ratios[dtype] = direct / converted
    times = f"{direct * 1e3:.1f} ms; by way of float32 {converted * 1e3:.2f} ms"
    print(f"{dtype}: {times}: x {ratios[dtype]:.0f}; results differ by {error:.2g}")
step, wide = muon_seconds(), seconds(lambda: orthogonalised(torch.randn(2, SIDE, SIDE)))
ratios["Muon"] = step / wide
print(f"a step of Muon: {step * 1e3:.0f} ms; its products in float32 {wide * 1e3:.1f} ms: x {step / wide:.0f}")
if min(ratios.values()) < 5:
    raise SystemExit("changed: half-precision products are no longer slow")
PYTHON
