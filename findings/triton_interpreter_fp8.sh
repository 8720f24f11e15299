#!/bin/sh
# triton 3.9.0, TRITON_INTERPRET=1 (a CPU is enough). A cast from float32 to an 8-bit float that rounds up past the mantissa loses the
# carry wherever the exponent's last bit is set already, in every second power of two: what lies just below 2, 8, 32, ... is halved
# (7.9 becomes 4, not 8; 3.9 becomes 4), without a word. Of values between 1 and 8 that is one in twenty-five for e4m3 and one in twelve
# for e5m2. Ties go up, not to even. torch's casts are right, so a quantising kernel may be, though the interpreter says otherwise.
. "$(dirname "$0")/run_with"
export TRITON_INTERPRET=1
run_with triton==3.9.0 torch==2.13.0 numpy==2.4.6 <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def through(x, out, n: tl.constexpr, dtype: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, tl.load(x + i).to(dtype).to(tl.float32))


print("triton", triton.__version__, "torch", torch.__version__)
few = torch.tensor([1.9, 1.95, 3.9, 7.9, 15.9, 8.0, 8.5, 9.0])
many = 1 + 7 * torch.rand(4096, generator=torch.Generator().manual_seed(0))
for name, theirs, ours in (("e4m3", tl.float8e4nv, torch.float8_e4m3fn), ("e5m2", tl.float8e5, torch.float8_e5m2)):
    shown = {}
    for x in (few, many):
        out = torch.empty_like(x)
        through[(1,)](x, out, len(x), theirs)
        shown[len(x)] = out, x.to(ours).float()
    print(name, "of", [round(v, 2) for v in few.tolist()])
    print("  the interpreter", shown[len(few)][0].tolist())
    print("  torch          ", shown[len(few)][1].tolist())
    out, right = shown[len(many)]
    halved = out == right / 2
    print(f"  {halved.float().mean():.1%} of 4096 values between 1 and 8 are half of what they should be")
    assert 0.02 < halved.float().mean() < 0.12, "the share of halved values has changed"
    assert shown[len(few)][0][3] == 4.0 and shown[len(few)][1][3] == 8.0, "7.9 is not halved any more"
PYTHON
