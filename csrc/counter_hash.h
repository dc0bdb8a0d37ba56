// Random bits that are a hash of (seed, row, column), as citi_kernels/ops/counter_hash.py has them:
// the same on every backend, never stored.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace citi {

// The bijection "lowbias32".
CITI_HOST_DEVICE static inline uint32_t Hash32(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

CITI_HOST_DEVICE static inline uint32_t HashOfRow(uint32_t row, uint64_t seed) {
  return Hash32(Hash32(row ^ static_cast<uint32_t>(seed)) ^ static_cast<uint32_t>(seed >> 32));
}

CITI_HOST_DEVICE static inline uint32_t RandomBits(uint32_t hash_of_row, uint32_t column) {
  return Hash32(hash_of_row + column * 0x9e3779b9u);
}

// One of the two neighbours in bf16, the nearer with the greater probability; by the low 16 bits.
CITI_HOST_DEVICE static inline BFloat16 RoundedStochastically(float value, uint32_t random_bits) {
  const uint32_t bits = BitsOfFloat(value);
  // Adding to the bits of inf or NaN would change what it is.
  if ((bits & 0x7f800000u) == 0x7f800000u) return Rounded<BFloat16>(value);
  return {static_cast<uint16_t>((bits + (random_bits & 0xffffu)) >> 16)};
}

}  // namespace citi
