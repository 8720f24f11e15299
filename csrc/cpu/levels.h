// The levels of instructions that operations are compiled for.
#pragma once

#include <vector>

#include "ops.h"

namespace ebr::cpu {

struct Level {
    const char* name;
    const Table* table;
};

// Those that this CPU has, each faster than the one before.
std::vector<Level> levels();

}  // namespace ebr::cpu
