#!/bin/sh
# triton 3.9.0, TRITON_INTERPRET=1 (a CPU is enough). Arithmetic on bfloat16 values in the interpreter gives numbers that have
# nothing to do with the result, without an error: their bits are taken for integers. float16 is right, and so is bfloat16 that
# is converted to float32 right after the load, which gives on a GPU what people expect of the first form.
. "$(dirname "$0")/run_with"
export TRITON_INTERPRET=1
run_with triton==3.9.0 torch==2.13.0 numpy==2.4.6 <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def double(x, out, n: tl.constexpr):
    i = tl.arange(0, n)
    value = tl.load(x + i)
    tl.store(out + i, value + value)


@triton.jit
def double_wide(x, out, n: tl.constexpr):
    i = tl.arange(0, n)
    value = tl.load(x + i).to(tl.float32)
    tl.store(out + i, value + value)


print("triton", triton.__version__, "torch", torch.__version__)
right = {}
for dtype in (torch.float16, torch.bfloat16):
    for kernel in (double, double_wide):
        x = torch.tensor([1.0, 1.5, -2.0, 3.0], dtype=dtype)
        out = torch.empty_like(x)
        kernel[(1,)](x, out, 4)
        right[dtype, kernel.fn.__name__] = torch.equal(out, x + x)
        print(f"{kernel.fn.__name__} of {x.tolist()} in {dtype}: {out.tolist()}")
if right != {key: key != (torch.bfloat16, "double") for key in right}:
    raise SystemExit("changed: only bfloat16 without a conversion was wrong")
PYTHON
