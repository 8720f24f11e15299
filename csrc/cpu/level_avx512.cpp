#include "attention.h"
#include "channels.h"
#include "convolution.h"
#include "rows.h"

const ebr::cpu::Table ebr::cpu::avx512{attention, norm, rope, gelu, channel_norm, convolution};
