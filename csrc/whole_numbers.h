// Arithmetic of sizes.
#pragma once

#include "dtype.h"

namespace citi {

// Static, as in dtype.h.

CITI_HOST_DEVICE static constexpr int64_t Min(int64_t x, int64_t y) { return x < y ? x : y; }

CITI_HOST_DEVICE static constexpr int64_t CeilDiv(int64_t x, int64_t y) { return (x + y - 1) / y; }

// To a multiple of y.
CITI_HOST_DEVICE static constexpr int64_t RoundUp(int64_t x, int64_t y) {
  return CeilDiv(x, y) * y;
}

}  // namespace citi
