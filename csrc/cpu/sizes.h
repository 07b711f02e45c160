#pragma once

namespace sui {

using Index = long long;

}  // namespace sui
