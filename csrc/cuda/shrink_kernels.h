// Device code of the shrink: z = x wᵀ for a stack w of few rows, in one pass over x.
//
//   Shrink        a block of 64 tokens and a share of K; routes at once, or leaves its part of z
//   SumAndRoute   adds the parts of z in order, then routes
//
// Also compiled as plain C++ by a test. T tokens, K in-features, Z rows of w (a multiple of 8).
#pragma once

#include "cuda/route_kernels.h"
#include "dropout.h"

namespace citi {

constexpr int kShrinkThreads = 256;
constexpr int kShrinkTokens = 64;  // 16 for each of four warps; the other four have the same
constexpr int kShrinkDepth = 64;   // of K, at a time: one half for each four warps
constexpr int kRouteTokens = 16;

struct ShrinkLaunch {
  const uint16_t* x;  // (T, K), rows x_stride apart
  const uint16_t* w;  // (Z, K)
  float* parts;       // (splits, T, Z); null: routed at once
  int64_t num_tokens, num_inputs, x_stride;
  int num_rows;        // Z
  int num_rank_tiles;  // tiles of 8 rows that see x with dropout
  int64_t num_splits, tiles_per_split;
  int num_stages;
  Dropout dropout;
  RouteLaunch route;
};

CITI_HOST_DEVICE constexpr int ShrinkStageBytes(int row_tiles) {
  return (kShrinkTokens + row_tiles * 8) * RowBytes(kShrinkDepth);
}

// The four words of an operand with what dropout drops set to zero: tokens t and t + 8, inputs k,
// k + 1, k + 8 and k + 9.
__device__ __forceinline__ void DropInputs(const Dropout& dropout, const uint32_t (&hashes)[2],
                                           int64_t k, const uint32_t (&from)[4],
                                           uint32_t (&to)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t first = k + i / 2 * 8;
    to[i] = KeptOf(from[i], Keeps(dropout, hashes[i % 2], first),
                   Keeps(dropout, hashes[i % 2], first + 1));
  }
}

template <class Element, int kTiles, bool kHasDropout>
__device__ __forceinline__ void MultiplyShrinkStage(const ShrinkLaunch& s,
                                                    const unsigned char* stage, int64_t first_k,
                                                    const uint32_t (&hashes)[2],
                                                    float (&sums)[kTiles][4]) {
  constexpr int kBytes = RowBytes(kShrinkDepth);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int half = warp / 4 * (kShrinkDepth / 2);
  const unsigned char* x =
      stage + (warp % 4 * 16 + lane % 16) * kBytes + lane / 16 * kChunkBytes + half * 2;
  const unsigned char* w = stage + (kShrinkTokens + lane % 8 + lane / 16 * 8) * kBytes +
                           lane / 8 % 2 * kChunkBytes + half * 2;
#pragma unroll
  for (int k = 0; k < kShrinkDepth / 2; k += 16) {
    uint32_t of_x[4], kept[4];
    LoadMatrices(of_x, x + k * 2);
    if constexpr (kHasDropout) {
      DropInputs(s.dropout, hashes, first_k + half + k + 2 * (lane % 4), of_x, kept);
    }
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t of_w[4];
      LoadMatrices(of_w, w + n * 8 * kBytes + k * 2);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (kHasDropout && n + i < s.num_rank_tiles) {
          MultiplyAdd<Element>(sums[n + i], kept, of_w[2 * i], of_w[2 * i + 1]);
        } else {
          MultiplyAdd<Element>(sums[n + i], of_x, of_w[2 * i], of_w[2 * i + 1]);
        }
      }
    }
  }
}

// The ring over this block's tiles of K.
template <class Element, int kTiles, bool kHasDropout>
__device__ __forceinline__ void SumShrink(const ShrinkLaunch& s, int64_t first_token,
                                          int64_t first_tile, int64_t num_tiles,
                                          unsigned char* memory, float (&sums)[kTiles][4]) {
  constexpr int kBytes = ShrinkStageBytes(kTiles);
  const auto copy = [&](int64_t tile, int slot) {
    const int64_t k = (first_tile + tile) * kShrinkDepth;
    unsigned char* stage = memory + slot * kBytes;
    CopyTile<kShrinkTokens, kShrinkDepth, kShrinkThreads>(stage, s.x + first_token * s.x_stride + k,
                                                          s.x_stride, s.num_tokens - first_token,
                                                          s.num_inputs - k);
    CopyTile<kTiles * 8, kShrinkDepth, kShrinkThreads>(
        stage + kShrinkTokens * RowBytes(kShrinkDepth), s.w + k, s.num_inputs, s.num_rows,
        s.num_inputs - k);
  };
  uint32_t hashes[2] = {};
  if constexpr (kHasDropout) {
    const int64_t t = first_token + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    hashes[0] = HashOfToken(s.dropout, t), hashes[1] = HashOfToken(s.dropout, t + 8);
  }
  for (int i = 0; i < s.num_stages - 1; ++i) {
    if (i < num_tiles) copy(i, i);
    CommitCopies();
  }
  int slot = 0, free_slot = s.num_stages - 1;
  for (int64_t i = 0; i < num_tiles; ++i) {
    WaitForOldest(s.num_stages);
    __syncthreads();
    if (i + s.num_stages - 1 < num_tiles) copy(i + s.num_stages - 1, free_slot);
    CommitCopies();
    MultiplyShrinkStage<Element, kTiles, kHasDropout>(
        s, memory + slot * kBytes, (first_tile + i) * kShrinkDepth, hashes, sums);
    free_slot = slot;
    slot = slot + 1 == s.num_stages ? 0 : slot + 1;
  }
  WaitForCopies<0>();
  __syncthreads();
}

// z [tokens, rows of w]: the sums over the one half of every tile of K and then the other.
template <int kTiles>
__device__ __forceinline__ void StoreSums(const float (&sums)[kTiles][4], float* z, int stride) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int half = 0; half < 2; ++half) {
    if (warp / 4 == half) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int t = warp % 4 * 16 + lane / 4 + i / 2 * 8;
          float* sum = z + t * stride + n * 8 + 2 * (lane % 4) + i % 2;
          *sum = half == 0 ? sums[n][i] : *sum + sums[n][i];
        }
      }
    }
    __syncthreads();
  }
}

// Grid: blocks of tokens * splits of K.
template <class Element, int kTiles, bool kHasDropout>
__global__ void __launch_bounds__(kShrinkThreads, kTiles <= 6 ? 2 : 1)
    Shrink(const ShrinkLaunch s) {
  constexpr int kStride = kTiles * 8 + 1;
  unsigned char* memory = SharedMemory();
  const int64_t split = blockIdx.x % s.num_splits;
  const int64_t first_token = blockIdx.x / s.num_splits * kShrinkTokens;
  const int64_t first_tile = split * s.tiles_per_split;
  const int64_t all_tiles = (s.num_inputs + kShrinkDepth - 1) / kShrinkDepth;
  const int64_t left = all_tiles - first_tile;
  float sums[kTiles][4] = {};
  SumShrink<Element, kTiles, kHasDropout>(s, first_token, first_tile,
                                          left < s.tiles_per_split ? left : s.tiles_per_split,
                                          memory, sums);
  // The ring is drained: its memory takes z.
  float* z = reinterpret_cast<float*>(memory);
  StoreSums(sums, z, kStride);
  const int64_t tokens_left = s.num_tokens - first_token;
  const int num_tokens =
      tokens_left < kShrinkTokens ? static_cast<int>(tokens_left) : kShrinkTokens;
  if (s.parts == nullptr) {
    Route<Element, kShrinkThreads>(s.route, z, kStride, first_token, num_tokens);
    return;
  }
  float* parts = s.parts + (split * s.num_tokens + first_token) * s.num_rows;
  for (int i = static_cast<int>(threadIdx.x); i < num_tokens * s.num_rows; i += kShrinkThreads) {
    parts[i] = z[i / s.num_rows * kStride + i % s.num_rows];
  }
}

// Grid: blocks of kRouteTokens tokens.
template <class Element>
__global__ void __launch_bounds__(kShrinkThreads) SumAndRoute(const ShrinkLaunch s) {
  float* z = reinterpret_cast<float*>(SharedMemory());
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kRouteTokens;
  const int64_t left = s.num_tokens - first_token;
  const int num_tokens = left < kRouteTokens ? static_cast<int>(left) : kRouteTokens;
  const int stride = s.num_rows + 1;
  for (int i = static_cast<int>(threadIdx.x); i < num_tokens * s.num_rows; i += kShrinkThreads) {
    const float* part = s.parts + first_token * s.num_rows + i;
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t split = 0; split < s.num_splits; ++split) {
      sum += part[split * s.num_tokens * s.num_rows];
    }
    z[i / s.num_rows * stride + i % s.num_rows] = sum;
  }
  __syncthreads();
  Route<Element, kShrinkThreads>(s.route, z, stride, first_token, num_tokens);
}

}  // namespace citi
