#!/bin/sh
# torch 2.13.0. `bool(module)` is True for a module without `__len__`, and raises TypeError for what torch.compile makes of it:
# the wrapper defines `__len__` for every module and refuses it only when it is called. So `if model:`, `model or default` and
# `filter(None, models)` work until a model is compiled. Nothing is compiled here: wrapping is enough.
. "$(dirname "$0")/run_with"
run_with torch==2.13.0 numpy==2.4.6 <<'PYTHON'
import torch

module = torch.nn.Linear(2, 2)
compiled = torch.compile(module)
print("torch", torch.__version__)
print("bool(module):", bool(module), "  hasattr(module, '__len__'):", hasattr(module, "__len__"))
print("hasattr(compiled, '__len__'):", hasattr(compiled, "__len__"))
try:
    chosen = compiled or module
except TypeError as error:
    print("compiled or module: TypeError:", error)
else:
    raise SystemExit(f"changed: a compiled module is {bool(compiled)}")
sequential = torch.compile(torch.nn.Sequential())
print("bool(torch.compile(Sequential())):", bool(sequential), "(empty, as it is uncompiled)")
PYTHON
