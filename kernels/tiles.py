"""What the products share whose tiles of the output are computed one by one: the order of tiles, and how a tile in fp8 ends."""

from ebr_engine.kernels.backend import tl, triton

GROUP = 8  # row tiles that are multiplied with one column tile while it is in the L2 cache


@triton.jit
def place(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column, in tiles, of a tile by its number: groups of row tiles go through all columns together."""
    first = tile // (GROUP * column_tiles) * GROUP
    group, within = min(row_tiles - first, GROUP), tile % (GROUP * column_tiles)
    return first + within % group, within // group


@triton.jit
def activated(y):
    """The tanh GELU: (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u))."""
    return y / (1.0 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))


@triton.jit
def bounded_scale(x_scale, bound, root):
    """Scales of a tile's rows by the output's bound, as `quantize_bounded_ref` makes them."""
    return tl.maximum(x_scale * (root * tl.load(bound)) + tl.load(bound + 1) * (1.0 / 448.0), 1e-12)


@triton.jit
def bounded(y, scale):
    """A tile in units of its rows' scales, within e4m3: a rounding may pass the bound."""
    return tl.minimum(tl.maximum(y * tl.div_rn(1.0, scale)[:, None], -448.0), 448.0)
