"""What the row-wise operations share, and the interpreter's fitness to test them."""

import pytest
import torch

from ebr_engine.kernels import backend
from ebr_engine.kernels.backend import tl, triton
from ebr_engine.kernels.rows import batch_stride, refuse_gradient, warps, wide


def test_a_row_has_sixteen_elements_a_thread():
    assert [warps(elements) for elements in (1, 512, 2048, 4096, 8192, 16384)] == [1, 1, 4, 8, 16, 16]


def test_arithmetic_is_float32_at_least():
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    assert [wide(torch.ones(1, dtype=dtype)).dtype for dtype in dtypes] == [torch.float32] * 3 + [torch.float64]


def test_a_shared_table_is_read_again_for_each_sample():
    tables = torch.randn(3, 6, 8)
    assert batch_stride("gate", tables[:, 2], 3, 8) == 48
    assert batch_stride("gate", tables[:1, 2], 3, 8) == 0
    with pytest.raises(ValueError, match=r"gate has shape \(3, 6\); \[3 or 1, 8\] was expected"):
        batch_stride("gate", tables[:, :, 0], 3, 8)


def test_a_gradient_is_refused_only_where_one_is_asked_for():
    x = torch.randn(3, requires_grad=True)
    refuse_gradient("op", None, x.detach())
    with torch.no_grad():
        refuse_gradient("op", x)
    with pytest.raises(ValueError, match="op has no gradient"):
        refuse_gradient("op", None, x)


@triton.jit
def copy_kernel(x, out, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(out + offsets, tl.load(x + offsets).to(out.dtype.element_ty))


@pytest.mark.skipif(not backend.INTERPRETED, reason="of Triton's interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_the_interpreter_rounds_to_the_nearest_even(dtype):
    x = torch.randn(4096) * torch.randint(-12, 8, (4096,)).float().exp2()
    x[:8] = torch.tensor([15.9, 17, 19, -17, 2**-10, 3 * 2**-10, 448, -0.0])
    x.clamp_(-448, 448)
    out = torch.empty(4096, dtype=dtype)
    assert out.float().isnan().all()  # poisoned: what a kernel does not write is seen
    copy_kernel[(1,)](x, out, 4096)
    assert torch.equal(out.float(), x.to(dtype).float())
