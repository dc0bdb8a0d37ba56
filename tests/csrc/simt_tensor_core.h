// The functions of csrc/cuda/tensor_core.h on the host, for kernels that simt.h runs.
//
// Written from the PTX ISA, not from the kernels. A copy happens when it is waited for, and not
// before: a wait that is missing leaves the NaN that shared memory began with.
#pragma once

#include <cassert>
#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

#include "simt.h"
// Device code needs its words first.
#include "cuda/tensor_core.h"

namespace citi {
namespace simt {

struct Copy {
  void* shared;
  const void* global;
  bool is_valid;
};

inline thread_local std::vector<Copy> open_copies;
inline thread_local std::deque<std::vector<Copy>> groups_of_copies;

inline void Finish(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    if (copy.is_valid) {
      std::memcpy(copy.shared, copy.global, 16);
    } else {
      std::memset(copy.shared, 0, 16);
    }
  }
}

// Of two elements in one word.
template <class Element>
float Half(uint64_t word, int which) {
  return ToFloat(Element{static_cast<uint16_t>(word >> (16 * which))});
}

inline void LoadMatrices(uint32_t (&words)[4], const void* row, bool is_transposed) {
  assert(reinterpret_cast<uintptr_t>(row) % 16 == 0);
  const unsigned lane = threadIdx.x % 32u, g = lane / 4, c = lane % 4;
  WithWarp({AsWord(row)}, [&](const auto* of_lanes) {
    const auto element = [&](unsigned matrix, unsigned r, unsigned column) {
      const auto* from = FromWord<const uint16_t*>(of_lanes[8 * matrix + r][0]);
      return uint32_t{from[column]};
    };
    for (unsigned i = 0; i < 4; ++i) {
      words[i] = is_transposed ? element(i, 2 * c, g) | element(i, 2 * c + 1, g) << 16
                               : element(i, g, 2 * c) | element(i, g, 2 * c + 1) << 16;
    }
  });
}

}  // namespace simt

inline unsigned char* SharedMemory() { return simt::block->Memory(); }

inline void LoadMatrices(uint32_t (&words)[4], const void* row) {
  simt::LoadMatrices(words, row, false);
}

inline void LoadMatricesTransposed(uint32_t (&words)[4], const void* row) {
  simt::LoadMatrices(words, row, true);
}

template <class Element>
void MultiplyAdd(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const unsigned lane = threadIdx.x % 32u, g = lane / 4, c = lane % 4;
  simt::WithWarp({a[0], a[1], a[2], a[3], b0, b1}, [&](const auto* words) {
    const auto element_of_a = [&](unsigned row, unsigned k) {
      const unsigned word = row / 8 + 2 * (k / 8);
      return simt::Half<Element>(words[4 * (row % 8) + k % 8 / 2][word], k % 2);
    };
    const auto element_of_b = [&](unsigned k, unsigned n) {
      return simt::Half<Element>(words[4 * n + k % 8 / 2][4 + k / 8], k % 2);
    };
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = g + 8 * (i / 2), n = 2 * c + i % 2;
      for (unsigned k = 0; k < 16; ++k) d[i] += element_of_a(row, k) * element_of_b(k, n);
    }
  });
}

inline void CopyAsync(void* shared, const void* global, bool is_valid) {
  assert(reinterpret_cast<uintptr_t>(shared) % 16 == 0);
  assert(!is_valid || reinterpret_cast<uintptr_t>(global) % 16 == 0);
  simt::open_copies.push_back({shared, global, is_valid});
}

inline void CommitCopies() {
  simt::groups_of_copies.push_back(std::move(simt::open_copies));
  simt::open_copies.clear();
}

template <int kPending>
void WaitForCopies() {
  while (simt::groups_of_copies.size() > kPending) {
    simt::Finish(simt::groups_of_copies.front());
    simt::groups_of_copies.pop_front();
  }
}

inline uint32_t LoadCount(const uint32_t* count) {
  return __atomic_load_n(count, __ATOMIC_ACQUIRE);
}

template <class Element>
uint32_t Pack(float first, float second) {
  return uint32_t{Rounded<Element>(first).bits} | uint32_t{Rounded<Element>(second).bits} << 16;
}

}  // namespace citi
