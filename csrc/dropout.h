// Dropout of the experts' inputs: a hash of (seed, token, input), so that no mask is ever stored.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "counter_hash.h"
#include "dtype.h"

namespace citi {

struct Dropout {
  uint32_t seed_low, seed_high;
  uint32_t threshold;  // an input is kept where its hash is at least this
  float inverse_keep;  // 1 / (1 - p); 1 without dropout
};

// What is wrong, beginning with the name, or "".
inline std::string InvalidDropout(const std::optional<Dropout>& dropout) {
  if (!dropout || dropout->inverse_keep >= 1.0f) return "";
  return "dropout: 1 / (1 - p) must be at least 1";
}

CITI_HOST_DEVICE static inline uint32_t HashOfToken(const Dropout& dropout, int64_t t) {
  const uint64_t seed = static_cast<uint64_t>(dropout.seed_high) << 32 | dropout.seed_low;
  return HashOfRow(static_cast<uint32_t>(t), seed);
}

CITI_HOST_DEVICE static inline bool Keeps(const Dropout& dropout, uint32_t hash_of_token,
                                          int64_t k) {
  return RandomBits(hash_of_token, static_cast<uint32_t>(k)) >= dropout.threshold;
}

// Of two neighbouring 16-bit elements those that are kept, zeros for the others.
CITI_HOST_DEVICE static inline uint32_t KeptOf(uint32_t word, bool keeps_first, bool keeps_second) {
  return word & ((keeps_first ? 0xffffu : 0u) | (keeps_second ? 0xffff0000u : 0u));
}

}  // namespace citi
