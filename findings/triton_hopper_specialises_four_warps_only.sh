#!/bin/sh
# triton 3.9.0, compiled for sm_90 (there 3.6.0 does the same) and sm_100; no GPU is needed. On Hopper `tl.range(...,
# warp_specialize=True)` is obeyed with 4 warps, where it makes a kernel of 12, and silently ignored with 8: the loop compiles as if it
# had not been asked for. On Blackwell, the only one that the documentation of tl.range names, both numbers are specialised. What
# tells is `metadata.num_warps` of the compiled kernel: a sweep over warps that looks at times alone takes an ordinary loop for a
# specialised one.
. "$(dirname "$0")/run_with"
export TRITON_DEFAULT_FP_FUSION=1
run_with triton==3.9.0 <<'PYTHON'
import os

os.environ["TRITON_CACHE_DIR"] = os.path.abspath("cache")
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(a, b, out, tiles, programs, SPECIALIZED: tl.constexpr):
    """bf16 tiles of 128 × 128, each of a product over 256, as many programs as given making one after the other."""
    a = tl.make_tensor_descriptor(a, [tiles * 128, 256], [256, 1], [128, 64])
    b = tl.make_tensor_descriptor(b, [128, 256], [256, 1], [128, 64])
    out = tl.make_tensor_descriptor(out, [tiles * 128, 128], [128, 1], [128, 128])
    for tile in tl.range(tl.program_id(0), tiles, programs, warp_specialize=SPECIALIZED):
        total = tl.zeros([128, 128], tl.float32)
        for k in range(0, 256, 64):
            total = tl.dot(a.load([tile * 128, k]), b.load([0, k]).T, total)
        out.store([tile * 128, 0], total.to(tl.bfloat16))


print("triton", triton.__version__)
types = {"a": "*bf16", "b": "*bf16", "out": "*bf16", "tiles": "i32", "programs": "i32", "SPECIALIZED": "constexpr"}
aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
found = {}
for arch in (90, 100):
    for warps in (4, 8):
        for asked in (False, True):
            source = ASTSource(product, types, {"SPECIALIZED": asked}, aligned)
            options = {"num_warps": warps, "num_stages": 3}
            kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            done = "ttg.warp_specialize" in kernel.asm["ttgir"]
            found[arch, warps, asked] = done, kernel.metadata.num_warps
            print(f"sm_{arch}, num_warps={warps}, warp_specialize={asked}: {kernel.metadata.num_warps} warps, specialised: {done}")
plain = all(found[arch, warps, False] == (False, warps) for arch, warps, _ in found)
if not plain or found[90, 4, True] != (True, 12) or found[90, 8, True] != (False, 8) or not found[100, 8, True][0]:
    raise SystemExit("changed: Hopper does not specialise four warps and ignore eight")
PYTHON
