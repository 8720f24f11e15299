"""`prompt_attention` for Hopper and Blackwell: as many programs as processors, queries, keys and values by tensor descriptors.

Its forward pass with one prompt and without log-sums, as restoring takes it; with more prompts, and in learning, tiles serve.

*persistent*: a program makes one tile of queries after the other.
*specialized*: in the sweep over the prompt's keys warps have one task each, copies, products or softmax.
"""

from torch import Tensor

from ebr_engine.kernels import backend
from ebr_engine.kernels.backend import tl, triton
from ebr_engine.kernels.heads import add_branch, constants, rows_of_heads, text_keys, text_stride

# Queries and keys of a tile, warps, stages: the largest that spill no register, by form and major compute capability. Hopper's
# compiler does not specialize the warps of this loop.
TILES = {
    ("persistent", 9): (128, 64, 8, 3),
    ("persistent", 10): (128, 64, 8, 2),
    ("specialized", 10): (128, 64, 8, 2),
}
SMALL_TILE = (32, 32, 4, 2)  # in the interpreter
ALIGNED = 16  # bytes of which the rows of a head are a multiple


@triton.jit
def prompt_attention_persistent_kernel(
    q, text_key, text_value, bias, key, value, weight, out,
    text_batch, batch, heads, tokens, text_rows, rows, scale, programs,
    SPECIALIZED: tl.constexpr, HEAD: tl.constexpr, DIMS: tl.constexpr,
    QUERIES: tl.constexpr, TEXT_KEYS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # Rows past a head's last are the next head's: keys are masked, and a masked key's value counts nothing.
    q = tl.make_tensor_descriptor(q, [batch * tokens, heads * HEAD], [heads * HEAD, 1], [QUERIES, DIMS])
    key = tl.make_tensor_descriptor(key, [heads * rows, HEAD], [HEAD, 1], [KEYS, DIMS])
    value = tl.make_tensor_descriptor(value, [heads * rows, HEAD], [HEAD, 1], [KEYS, DIMS])
    tiles, dims = tl.cdiv(tokens, QUERIES), tl.arange(0, DIMS)
    for tile in tl.range(tl.program_id(0), batch * heads * tiles, programs):
        h, b, block = tile % heads, tile // heads // tiles, tile // heads % tiles  # a token's heads run together
        b_q = q.load([b * tokens + block * QUERIES, h * HEAD])
        largest = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        b_out = tl.zeros([QUERIES, DIMS], tl.float32)
        for start in tl.range(0, rows, KEYS, warp_specialize=SPECIALIZED):
            logits = tl.dot(b_q, key.load([h * rows + start, 0]).T) * scale
            logits = tl.where((start + tl.arange(0, KEYS) < rows)[None], logits, float("-inf"))
            larger = tl.maximum(largest, tl.max(logits, 1))
            likely, shrink = tl.exp2(logits - larger[:, None]), tl.exp2(largest - larger)
            b_v = value.load([h * rows + start, 0])
            b_out = tl.dot(likely.to(b_v.dtype), b_v, b_out * shrink[:, None])
            total = total * shrink + tl.sum(likely, 1)
            largest = larger
        b_out *= (tl.load(weight).to(tl.float32) / total)[:, None]
        text = (b * text_batch + h * text_rows * HEAD).to(tl.int64)
        b_out, _ = add_branch(
            b_out, 1.0, b_q, text_key + text, text_value + text, bias, text_rows, scale, True, HEAD, QUERIES, TEXT_KEYS, DIMS
        )
        n = block * QUERIES + tl.arange(0, QUERIES)
        offsets = ((b * tokens + n[:, None]).to(tl.int64) * heads + h) * HEAD + dims[None]
        mask = (n < tokens)[:, None] & (dims < HEAD)[None]
        tl.store(out + offsets, b_out.to(out.dtype.element_ty), mask=mask)


def described(q: Tensor, prompt_key: Tensor) -> bool:
    """Whether descriptors can be made of these: heads side by side in a token's row, as wide as a tile; one prompt."""
    head, aligned = q.shape[-1], q.shape[-1] * q.element_size() % ALIGNED == 0 and q.data_ptr() % ALIGNED == 0
    whole = head >= 16 and head & (head - 1) == 0  # the queries past a head's width would be the next head's
    return bool(q.numel()) and prompt_key.shape[0] == 1 and aligned and whole and q.transpose(1, 2).is_contiguous()


def prompt_attention_persistent_launch(
    q: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    text_log_count: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    prompt_weight: Tensor,
    form: str,
) -> Tensor:
    """Run the kernel in a form of `TILES` on what is `described`; the output as `prompt_attention_launch` has it."""
    batch, heads, tokens, head = q.shape
    queries, keys, warps, stages = TILES.get((form, backend.capability(q)), SMALL_TILE)
    out = rows_of_heads(q)
    programs = min(backend.processors(q), batch * heads * triton.cdiv(tokens, queries))
    backend.scratch(q)
    with backend.on(q):
        prompt_attention_persistent_kernel[(programs,)](
            q, text_key.contiguous(), text_value.contiguous(), text_log_count.contiguous(),
            prompt_key.contiguous(), prompt_value.contiguous(), prompt_weight.contiguous(), out,
            text_stride(text_key), batch, heads, tokens, text_key.shape[2], prompt_key.shape[2],
            head**-0.5 * 1.4426950408889634, programs, SPECIALIZED=form == "specialized",
            QUERIES=queries, TEXT_KEYS=text_keys(text_key.shape[2], keys), KEYS=keys,
            num_warps=warps, num_stages=stages, **constants(q),
        )  # fmt: skip
    return out
