#include "amx_float.h"
#include "amx_gradient.h"
#include "channels.h"
#include "convolution.h"
#include "row_gradients.h"
#include "rows.h"
#include "weight_gradient.h"

namespace {
bool by_dtype(const ebr::cpu::Attention& a) {
    return a.dtype == ebr::cpu::Dtype::float32 ? ebr::cpu::float_attention(a) : ebr::cpu::amx_attention(a);
}
}  // namespace

const ebr::cpu::Table ebr::cpu::amx{by_dtype, norm, rope, gelu, amx_gradient, norm_gradient,
                                        rope_gradient, channel_norm, convolution, weight_gradient};
