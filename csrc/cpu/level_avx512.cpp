#include "attention.h"
#include "rows.h"

const ebr::cpu::Table ebr::cpu::avx512{attention, norm, rope, gelu};
