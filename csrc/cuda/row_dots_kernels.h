// Device code of the row dots. Also compiled as plain C++ by a test, which runs the threads of a
// block as threads of the host; hence no header of CUDA's but those that dtype.h needs.
//
// Two kernels form the sums of a share of the tokens, SumParts adds the shares to the scores:
//   SegmentDots   a group of up to 32 lanes per segment, its dot by shuffles
//   ColumnDots    segments of one feature: a thread owns neighbouring columns
// Each thread sums its tokens in fp64, in order; a block adds its threads' sums in order.
//
// Shapes: T tokens, F features, S segments of `length` features.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace citi {

constexpr int kThreads = 256;
// On a multiprocessor at least. Left to itself, ptxas saves registers and spills.
constexpr int kMinBlocks = 3;
constexpr int kVectorBytes = 16;
// Tokens whose loads are in flight at once in ColumnDots.
constexpr int kTokensAtOnce = 4;

// What kernels take of a RowDots, and how threads are laid out.
struct RowDotsLaunch {
  const void* a;
  const void* b;
  const uint8_t* valid;
  const float* offset;
  double* parts;
  int64_t num_tokens;
  int64_t num_features;
  int64_t num_segments;
  int64_t length;
  int64_t a_stride_t, a_stride_f;
  int64_t b_stride_t, b_stride_f;
  DType a_dtype, b_dtype;
  bool is_signed;
  int64_t tokens_per_part;
  uint32_t num_tiles;  // fits, as blocks do; divisions by it stay in 32 bits
  int lanes;           // threads of a segment; in ColumnDots threads side by side
  int tile_threads;    // threads of a token: of all segments of a tile
};

// Elements of one dtype, contiguous in f, rows aligned to 16 bytes.
template <class Element>
struct AlignedElements {
  static constexpr int kWidth = kVectorBytes / sizeof(Element);

  __device__ static void Load(const void* data, DType, int64_t stride_t, int64_t, int64_t t,
                              int64_t f, float* to) {
    const Element* from = static_cast<const Element*>(data) + t * stride_t + f;
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(Element) == 4) {
        to[i] = FloatOfBits(words[i]);
      } else {
        to[2 * i] = ToFloat(Element{static_cast<uint16_t>(words[i] & 0xffffu)});
        to[2 * i + 1] = ToFloat(Element{static_cast<uint16_t>(words[i] >> 16)});
      }
    }
  }
};

__device__ inline float LoadOne(const void* data, DType dtype, int64_t at) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[at];
  if (dtype == DType::kBFloat16) return ToFloat(static_cast<const BFloat16*>(data)[at]);
  return ToFloat(static_cast<const Float16*>(data)[at]);
}

// Elements of any dtype and strides, one by one.
struct AnyElements {
  static constexpr int kWidth = 1;

  __device__ static void Load(const void* data, DType dtype, int64_t stride_t, int64_t stride_f,
                              int64_t t, int64_t f, float* to) {
    *to = LoadOne(data, dtype, t * stride_t + f * stride_f);
  }
};

// The products of kWidth features, added to sums or, for columns, written.
template <class Elements>
__device__ inline void Multiply(const RowDotsLaunch& r, int64_t t, int64_t f, float* products) {
  float a[Elements::kWidth], b[Elements::kWidth];
  Elements::Load(r.a, r.a_dtype, r.a_stride_t, r.a_stride_f, t, f, a);
  Elements::Load(r.b, r.b_dtype, r.b_stride_t, r.b_stride_f, t, f, b);
#pragma unroll
  for (int i = 0; i < Elements::kWidth; ++i) {
    products[i] = (r.offset == nullptr ? a[i] : a[i] - r.offset[f + i]) * b[i];
  }
}

// This lane's share of the dot of a segment that begins at feature `first`.
template <class Elements>
__device__ inline float DotOfLane(const RowDotsLaunch& r, int64_t t, int64_t first, int lane) {
  constexpr int kWidth = Elements::kWidth;
  float sums[kWidth] = {};
  const int64_t whole = r.length - r.length % kWidth;
#pragma unroll 4
  for (int64_t l = static_cast<int64_t>(lane) * kWidth; l < whole;
       l += static_cast<int64_t>(r.lanes) * kWidth) {
    float products[kWidth];
    Multiply<Elements>(r, t, first + l, products);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums[i] += products[i];
  }
  for (int64_t l = whole + lane; l < r.length; l += r.lanes) {
    float product;
    Multiply<AnyElements>(r, t, first + l, &product);
    sums[0] += product;
  }
  float sum = sums[0];
#pragma unroll
  for (int i = 1; i < kWidth; ++i) sum += sums[i];
  return sum;
}

__device__ inline bool Counts(const RowDotsLaunch& r, int64_t t, int64_t end) {
  return t < end && (r.valid == nullptr || r.valid[t] != 0);
}

__device__ inline int64_t EndOfPart(const RowDotsLaunch& r, int64_t part) {
  const int64_t end = (part + 1) * r.tokens_per_part;
  return end < r.num_tokens ? end : r.num_tokens;
}

// Grid: parts * tiles. A block: tile_threads / lanes segments of kThreads / tile_threads tokens.
template <class Elements>
__global__ void __launch_bounds__(kThreads, kMinBlocks) SegmentDots(const RowDotsLaunch r) {
  __shared__ double sums[kThreads];
  const int64_t part = blockIdx.x / r.num_tiles;
  const int segments = r.tile_threads / r.lanes;
  const int lane = static_cast<int>(threadIdx.x) % r.lanes;
  const int in_tile = static_cast<int>(threadIdx.x) % r.tile_threads / r.lanes;
  const int first_token = static_cast<int>(threadIdx.x) / r.tile_threads;
  const int num_tokens = kThreads / r.tile_threads;
  const int64_t s = static_cast<int64_t>(blockIdx.x % r.num_tiles) * segments + in_tile;
  const int64_t end = EndOfPart(r, part);
  double total = 0.0;
  // All threads make the same number of steps: shuffles need the whole warp.
  for (int64_t t0 = part * r.tokens_per_part; t0 < end; t0 += num_tokens) {
    const int64_t t = t0 + first_token;
    const bool counts = s < r.num_segments && Counts(r, t, end);
    float dot = counts ? DotOfLane<Elements>(r, t, s * r.length, lane) : 0.0f;
    for (int width = r.lanes / 2; width > 0; width /= 2) {
      dot += __shfl_xor_sync(0xffffffffu, dot, width);
    }
    if (counts) total += static_cast<double>(r.is_signed ? dot : fabsf(dot));
  }
  sums[threadIdx.x] = total;
  __syncthreads();
  if (first_token == 0 && lane == 0 && s < r.num_segments) {
    double sum = 0.0;
    for (int i = 0; i < num_tokens; ++i) sum += sums[i * r.tile_threads + in_tile * r.lanes];
    r.parts[part * r.num_segments + s] = sum;
  }
}

// Grid: parts * tiles. A block: lanes * kWidth columns of kThreads / lanes tokens.
template <class Elements>
__global__ void __launch_bounds__(kThreads, kMinBlocks) ColumnDots(const RowDotsLaunch r) {
  constexpr int kWidth = Elements::kWidth;
  __shared__ double sums[kThreads * kWidth];
  const int64_t part = blockIdx.x / r.num_tiles;
  const int lane = static_cast<int>(threadIdx.x) % r.lanes;
  const int first_token = static_cast<int>(threadIdx.x) / r.lanes;
  const int num_tokens = kThreads / r.lanes;
  const int tile = r.lanes * kWidth;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x % r.num_tiles) * tile;
  const int64_t f = first_column + lane * kWidth;
  const int64_t end = f < r.num_features ? EndOfPart(r, part) : 0;
  double total[kWidth] = {};
  for (int64_t t0 = part * r.tokens_per_part + first_token; t0 < end;
       t0 += kTokensAtOnce * num_tokens) {
    float products[kTokensAtOnce][kWidth];
    bool counts[kTokensAtOnce];
#pragma unroll
    for (int k = 0; k < kTokensAtOnce; ++k) {
      const int64_t t = t0 + k * num_tokens;
      counts[k] = Counts(r, t, end);
      if (counts[k]) Multiply<Elements>(r, t, f, products[k]);
    }
#pragma unroll
    for (int k = 0; k < kTokensAtOnce; ++k) {
      if (!counts[k]) continue;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        total[i] += static_cast<double>(r.is_signed ? products[k][i] : fabsf(products[k][i]));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sums[first_token * tile + lane * kWidth + i] = total[i];
  __syncthreads();
  for (int column = static_cast<int>(threadIdx.x); column < tile; column += kThreads) {
    if (first_column + column >= r.num_features) break;
    double sum = 0.0;
    for (int i = 0; i < num_tokens; ++i) sum += sums[i * tile + column];
    r.parts[part * r.num_segments + first_column + column] = sum;
  }
}

// Grid: tiles of `segments` scores; kThreads / segments threads share the parts of each.
template <class Score>
__global__ void __launch_bounds__(kThreads)
    SumParts(const double* parts, Score* scores, int64_t num_parts, int64_t num_segments,
             int segments) {
  __shared__ double sums[kThreads];
  const int in_tile = static_cast<int>(threadIdx.x) % segments;
  const int first_part = static_cast<int>(threadIdx.x) / segments;
  const int part_step = kThreads / segments;
  const int64_t s = static_cast<int64_t>(blockIdx.x) * segments + in_tile;
  double total = 0.0;
  if (s < num_segments) {
#pragma unroll 4
    for (int64_t part = first_part; part < num_parts; part += part_step) {
      total += parts[part * num_segments + s];
    }
  }
  sums[threadIdx.x] = total;
  __syncthreads();
  for (int width = part_step / 2; width > 0; width /= 2) {
    if (first_part < width) sums[threadIdx.x] += sums[threadIdx.x + width * segments];
    __syncthreads();
  }
  if (first_part == 0 && s < num_segments) {
    scores[s] = static_cast<Score>(static_cast<double>(scores[s]) + sums[in_tile]);
  }
}

}  // namespace citi
