#include "attention_gradient.h"
#include "channels.h"
#include "convolution.h"
#include "row_gradients.h"
#include "rows.h"

const ebr::cpu::Table ebr::cpu::avx2{attention, norm, rope, gelu, attention_gradient, norm_gradient,
                                        rope_gradient, channel_norm, convolution, nullptr};
