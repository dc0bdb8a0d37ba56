// Dropout of the experts' inputs: a hash of (seed, token, input), so that no mask is ever stored.
// The bits are those of citi_kernels/ops/counter_hash.py.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace citi {

struct Dropout {
  uint32_t seed_low, seed_high;
  uint32_t threshold;  // an input is kept where its hash is at least this
  float inverse_keep;  // 1 / (1 - p); 1 without dropout
};

// A bijection that spreads every bit ("lowbias32").
CITI_HOST_DEVICE static inline uint32_t Hash32(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

CITI_HOST_DEVICE static inline uint32_t HashOfToken(const Dropout& dropout, int64_t t) {
  return Hash32(Hash32(static_cast<uint32_t>(t) ^ dropout.seed_low) ^ dropout.seed_high);
}

CITI_HOST_DEVICE static inline bool Keeps(const Dropout& dropout, uint32_t hash_of_token,
                                          int64_t k) {
  return Hash32(hash_of_token + static_cast<uint32_t>(k) * 0x9e3779b9u) >= dropout.threshold;
}

// Of two neighbouring 16-bit elements those that are kept, zeros for the others.
CITI_HOST_DEVICE static inline uint32_t KeptOf(uint32_t word, bool keeps_first, bool keeps_second) {
  return word & ((keeps_first ? 0xffffu : 0u) | (keeps_second ? 0xffff0000u : 0u));
}

}  // namespace citi
