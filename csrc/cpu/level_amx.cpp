#include "amx.h"
#include "rows.h"

const ebr::cpu::Table ebr::cpu::amx{amx_attention, norm, rope, gelu};
