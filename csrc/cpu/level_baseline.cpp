#include "attention.h"
#include "rows.h"

const ebr::cpu::Table ebr::cpu::baseline{attention, norm, rope, gelu};
