// Element types of tensors, and what every one of them is in fp32.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define CITI_HOST_DEVICE __host__ __device__
#else
#define CITI_HOST_DEVICE
#endif

namespace citi {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3, kBool = 4 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// Functions here are static: a variant compiled for a newer CPU must not lend its copy to others.

static inline bool IsKnown(DType dtype) {
  return dtype >= DType::kFloat32 && dtype <= DType::kBool;
}

static inline int64_t SizeOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kBool:
      return 1;
  }
  return 0;
}

CITI_HOST_DEVICE static inline float FloatOfBits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

CITI_HOST_DEVICE static inline uint32_t BitsOfFloat(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

CITI_HOST_DEVICE static inline float ToFloat(float value) { return value; }

CITI_HOST_DEVICE static inline float ToFloat(BFloat16 value) {
  return FloatOfBits(static_cast<uint32_t>(value.bits) << 16);
}

CITI_HOST_DEVICE static inline float ToFloat(Float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return FloatOfBits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x0400u) return FloatOfBits(sign | ((magnitude << 13) + (112u << 23)));
  // A subnormal is magnitude * 2^-24, which fp32 holds exactly.
  const float value_of_subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
  return sign ? -value_of_subnormal : value_of_subnormal;
#endif
}

CITI_HOST_DEVICE static inline uint16_t BFloat16BitsOf(float value) {
  const uint32_t bits = BitsOfFloat(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

CITI_HOST_DEVICE static inline uint16_t Float16BitsOf(float value) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = BitsOfFloat(value), magnitude = bits & 0x7fffffffu;
  const uint32_t sign = bits >> 16 & 0x8000u;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  // From 65520 on.
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Below 2^-14 in steps of 2^-24: the sum with 0.5 has these, and is rounded to them.
    const uint32_t sum = BitsOfFloat(FloatOfBits(magnitude) + 0.5f);
    return static_cast<uint16_t>(sign | (sum - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
#endif
}

// The nearest number, ties to even.
template <class Element>
CITI_HOST_DEVICE static inline Element Rounded(float value) {
  if constexpr (std::is_same_v<Element, BFloat16>) {
    return {BFloat16BitsOf(value)};
  } else if constexpr (std::is_same_v<Element, Float16>) {
    return {Float16BitsOf(value)};
  } else {
    return value;
  }
}

}  // namespace citi
