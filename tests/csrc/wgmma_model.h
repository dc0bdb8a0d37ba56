// A model of matrix products of a warp group on the host, with the names of cuda/wgmma.h. Written
// from the PTX ISA alone, section names in brackets; see hopper_model.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "hopper_model.h"

namespace citi::hopper {

// [Matrix-descriptor] Fields in units of 16 bytes.
struct Descriptor {
  explicit Descriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3fff) << 4),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1) Fail("no 128-byte swizzle in the descriptor");
    if ((bits >> 49 & 7) != 0) Fail("a pattern that begins at an aligned address has no offset");
    const uint64_t reserved =
        uint64_t{3} << 14 | uint64_t{3} << 30 | uint64_t{7} << 46 | uint64_t{0x3ff} << 52;
    if ((bits & reserved) != 0) Fail("reserved bits in the descriptor");
  }
  uint32_t start, leading, stride;
};

// [Strides, canonical layouts; 128-byte swizzle, T = 8 elements of 16 bits in 16 bytes]
//   K-major    ((8, m), (T, 2k)) : ((8 T, stride), (1, T))
//   MN-major   ((T, 8, m), (8, k)) : ((1, T, leading), (8 T, stride))
// `outer` counts rows or columns of the product, `depth` from 0 to 15.
inline uint32_t AddressOf(const Descriptor& matrix, bool is_k_major, uint32_t outer,
                          uint32_t depth) {
  if (is_k_major) {
    return Swizzled(matrix.start + outer % 8 * 128 + outer / 8 * matrix.stride + depth * 2);
  }
  return Swizzled(matrix.start + outer % 64 * 2 + outer / 64 * matrix.leading + depth % 8 * 128 +
                  depth / 8 * matrix.stride);
}

// What every 16-bit number is in fp32.
inline const std::vector<float>& Numbers(DType dtype) {
  static const auto table = [](auto element) {
    std::vector<float> numbers(1 << 16);
    for (uint32_t bits = 0; bits < 1 << 16; ++bits) {
      element.bits = static_cast<uint16_t>(bits);
      numbers[bits] = ToFloat(element);
    }
    return numbers;
  };
  static const std::vector<float> bfloat16 = table(BFloat16{}), float16 = table(Float16{});
  return dtype == DType::kBFloat16 ? bfloat16 : float16;
}

inline float Element(const std::vector<float>& numbers, uint32_t address) {
  uint16_t bits;
  std::memcpy(&bits, me.block->At(address, 2), 2);
  return numbers[bits];
}

// [Register fragments of wgmma.m64nNk16] Of its two rows a thread holds columns 8 j + 2 (t % 4) and
// the next: accumulator 4 j + 2 h + c is row 16 w + l / 4 + 8 h of warp w and lane l.
inline void Form(const Product& product) {
  const Descriptor left(product.left), right(product.right);
  const std::vector<float>& numbers = Numbers(product.dtype);
  const uint32_t thread = me.index % 128, lane = thread % 32;
  const uint32_t first_row = thread / 32 * 16 + lane / 4;
  float rows[2][16];
  for (uint32_t h = 0; h < 2; ++h) {
    for (uint32_t k = 0; k < 16; ++k) {
      rows[h][k] = Element(numbers, AddressOf(left, true, first_row + 8 * h, k));
    }
  }
  for (uint32_t j = 0; j < static_cast<uint32_t>(product.width) / 8; ++j) {
    for (uint32_t c = 0; c < 2; ++c) {
      const uint32_t column = 8 * j + lane % 4 * 2 + c;
      float* first = product.acc + 4 * j + c;
      for (uint32_t k = 0; k < 16; ++k) {
        const float value = Element(numbers, AddressOf(right, !product.is_column_major, column, k));
        first[0] += rows[0][k] * value;
        first[2] += rows[1][k] * value;
      }
    }
  }
}

inline void FenceProducts() { me.is_fenced = true; }

template <DType kDType, bool kIsColumnMajor, int kSize>
void Multiply(float (&acc)[kSize], uint64_t left, uint64_t right) {
  if (!me.is_fenced) Fail("a batch of products without wgmma.fence");
  me.issued.push_back({kDType, kIsColumnMajor, 2 * kSize, acc, left, right});
}

inline void CommitProducts() {
  me.batches.push_back(std::move(me.issued));
  me.issued.clear();
  me.is_fenced = false;
}

// [wgmma.wait_group, .sync.aligned] A warp waits as one; the warps of a group each for themselves.
template <int kPending>
void WaitProducts() {
  while (me.batches.size() > kPending) {
    for (const Product& product : me.batches.front()) Form(product);
    me.batches.pop_front();
  }
  SyncWarp();
}

template <int kSize>
void FenceAccumulators(float (&)[kSize]) {}

}  // namespace citi::hopper
