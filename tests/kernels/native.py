"""What the tests of the native code for CPUs share: the dtypes that it reads, and the layouts of a rotated projection."""

import pytest
import torch

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
HEADS = pytest.mark.parametrize(("heads", "head"), [(4, 64), (3, 32), (2, 128)])
LENGTHS = pytest.mark.parametrize("length", [None, 0, 5])
PER_HEAD = pytest.mark.parametrize("per_head", [True, False])


def rotated(dtype, per_head, length, heads, head):
    """`qk_norm_rope`'s arguments but for eps: qkv [2, 19, 3D], two weights, cos, sin, the number of heads, and rows or None."""
    width = heads * head
    qkv = (2 * torch.randn(2, 19, 3 * width)).to(dtype)
    weights = 1 + torch.randn(2, head if per_head else width) / 2
    angle = torch.rand(19, head // 2) * 6.3
    rows = None if length is None else torch.randn(length, 3 * width).to(dtype)
    return qkv, *weights, angle.cos(), angle.sin(), heads, rows
