#include "attention.h"
#include "rows.h"

const ebr::cpu::Table ebr::cpu::avx2{attention, norm, rope, gelu};
