#!/bin/sh
# torch 2.13.0. The first addition of two tensors on the meta device, where nothing is computed, imports torch's compiler and
# sympy: hundreds of modules, and about as long as `import torch` itself. Making such tensors imports nothing, so counting a
# model's parameters on the meta device is quick, and one addition of their shapes is not.
. "$(dirname "$0")/run_with"
run_with torch==2.13.0 numpy==2.4.6 <<'PYTHON'
import sys
import time

started = time.perf_counter()
import torch

print("torch", torch.__version__)
print(f"import torch: {time.perf_counter() - started:.2f} s, {len(sys.modules)} modules")


def step(name, function):
    before, started = len(sys.modules), time.perf_counter()
    result = function()
    print(f"{name}: {time.perf_counter() - started:.4f} s, {len(sys.modules) - before} modules imported")
    return result, len(sys.modules) - before


x, made = step("torch.empty(2, 2, device='meta')", lambda: torch.empty(2, 2, device="meta"))
_, first = step("x + x", lambda: x + x)
_, second = step("x + x again", lambda: x + x)
found = [name for name in ("sympy", "torch._dynamo", "torch._inductor") if name in sys.modules]
print("imported now:", ", ".join(found))
if made or second or first < 300 or len(found) < 3:
    raise SystemExit("changed: the first addition does not import the compiler")
PYTHON
