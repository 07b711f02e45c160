#pragma once

namespace sui {

using Index = long long;

enum class Kind { real, bfloat16 };  // of the numbers of an input: T itself, or bfloat16 where T is float

}  // namespace sui
