// Memory of large results.
#pragma once

#include "sizes.h"

namespace sui {

// The first touch of fresh memory costs several times the arithmetic of a removal, so the memory of the result that was
// let go last is kept for the next one of about its size: one block, of at most kMostKept bytes. Any thread may call.
constexpr Index kMostKept = Index(1) << 28;

void* take_result(Index bytes);  // nullptr: no memory
void return_result(void* memory);

}  // namespace sui
