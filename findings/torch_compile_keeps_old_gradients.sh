#!/bin/sh
# torch 2.13.0. A custom operator's gradient, given by `register_autograd`, is compiled into a graph that is kept on disk. What finds it
# again is the forward graph alone: a package whose new version has another formula for the gradient goes on with the old one, in
# every process, silently, until the cache is emptied. Not compiled, or by `torch.autograd.Function`, the same change is seen at once.
# `torch.compiler.config.cache_key_tag` tells graphs apart. (pytorch issue 144344 has it, open since January 2025.)
. "$(dirname "$0")/run_with"
run_with torch==2.13.0 numpy==2.4.6 <<'PYTHON'
import os
import subprocess
import sys
from pathlib import Path

OPERATOR = """
import torch

@torch.library.custom_op("shop::doubled", mutates_args=())
def operator(x: torch.Tensor) -> torch.Tensor:
    return 2 * x

operator.register_fake(torch.empty_like)
operator.register_autograd(lambda ctx, gradient: gradient * FACTOR)
"""
FUNCTION = """
import torch

class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient * FACTOR

operator = Doubled.apply
"""
RUN = """
import sys
import torch
import torch.compiler.config
from package import operator

torch.compiler.config.cache_key_tag = sys.argv[1]

def total(x):
    return operator(x).sum()

for function in (total, torch.compile(total)):
    x = torch.ones(3, requires_grad=True)
    function(x).backward()
    print(x.grad[0].item(), end=" ")
"""
Path("run.py").write_text(RUN)


def gradients(code, factor, tag=""):
    """Of the version of a package with this factor, not compiled and compiled, in a process of its own."""
    Path("package.py").write_text(code.replace("FACTOR", str(factor)))
    there = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(Path("cache").resolve()), "PYTHONDONTWRITEBYTECODE": "1"}
    return [float(part) for part in subprocess.check_output([sys.executable, "run.py", tag], env=there, text=True).split()]


import torch

print("torch", torch.__version__)
seen = [gradients(OPERATOR, 2.0), gradients(OPERATOR, 5.0), gradients(OPERATOR, 5.0, "new"), gradients(FUNCTION, 2.0), gradients(FUNCTION, 5.0)]
for name, (eager, compiled) in zip(
    (
        "register_autograd, gradient 2",
        "the same, gradient 5 in its next version",
        "the same, with a cache_key_tag",
        "torch.autograd.Function, gradient 2",
        "the same, gradient 5 in its next version",
    ),
    seen,
):
    print(f"{name}: {eager} not compiled, {compiled} compiled")
if seen != [[2, 2], [5, 2], [5, 5], [2, 2], [5, 5]]:
    raise SystemExit("changed: compiled gradients follow the operator's, or differ otherwise")
PYTHON
