"""What the kernels of cross-attention share."""

import pytest
import torch

from ebr_engine.kernels import backend
from ebr_engine.kernels.heads import launches, logits_ref, rows_of_heads, text_keys, text_stride


def test_joining_heads_is_free():
    out = rows_of_heads(torch.randn(2, 3, 5, 7))
    assert out.shape == (2, 3, 5, 7)
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


@pytest.mark.skipif(not backend.INTERPRETED, reason="where nothing is launched, Triton is not imported")
@pytest.mark.parametrize(("rows", "tile"), [(1, 16), (2, 16), (16, 16), (17, 32), (64, 64), (226, 64)])
def test_a_tile_of_text_is_as_small_as_products_allow(rows, tile):
    assert text_keys(rows, 64) == tile


def test_shared_text_has_no_stride():
    assert text_stride(torch.randn(1, 3, 2, 8)) == 0
    assert text_stride(torch.randn(4, 3, 2, 8)) == 48


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_keep_what_is_wider_than_float32(dtype):
    q, key = torch.randn(2, 1, 2, 3, 4, dtype=dtype).unbind()
    logits = logits_ref(q, key, torch.arange(3.0))
    assert logits.dtype == dtype
    torch.testing.assert_close(logits, torch.einsum("bhnd,bhmd->bhnm", q, key) / 2 + torch.arange(3))


@pytest.mark.parametrize(
    ("dtype", "head", "served"),
    [
        (torch.float32, 128, True),
        (torch.float16, 16, True),
        (torch.bfloat16, 64, False),  # the interpreter's products of it are wrong
        (torch.float64, 64, False),
        (torch.float32, 130, False),
    ],
)
def test_what_the_kernels_do_not_serve_is_left_to_the_reference(dtype, head, served):
    assert launches(torch.zeros(1, 1, 1, head, dtype=dtype)) == (served and backend.INTERPRETED)
