#include "attention.h"
#include "channels.h"
#include "convolution.h"
#include "rows.h"

const ebr::cpu::Table ebr::cpu::baseline{attention, norm, rope, gelu, channel_norm, convolution};
