// Device code of the gradients of low-rank factors: sums over tokens of products with a wide
// matrix, in one pass over it.
//
//   parts[share][n][v] = Σ_{t in share} wide[t, n] · narrow[t, v]
//   du[tile][t][r]     = Σ_{n in tile} wide[t, n] · b[n, r]       from the same tiles, if wanted
//
// wide = dy, narrow = u:               parts of db, and of du = dy b
// wide = x, narrow = [dh | dlogits]:   parts of da and drouter, transposed
// Also compiled as plain C++ by a test. T tokens, N columns of wide, V of narrow (a multiple of 8),
// R stacked rank.
#pragma once

#include "cuda/pipeline.h"
#include "dropout.h"

namespace citi {

constexpr int kFactorThreads = 256;
constexpr int kFactorTokens = 64;  // at a time
constexpr int kUpTiles = 4;        // of 8 columns of u, in the kernel that gives du as well

struct FactorLaunch {
  const uint16_t* wide;    // (T, N), rows wide_stride apart
  const uint16_t* narrow;  // (T, V), rows narrow_stride apart
  const uint16_t* b;       // (N, R)
  float* du;               // (tiles, T, V)
  float* parts;            // (shares, N, V)
  int64_t num_tokens, num_columns, wide_stride, narrow_stride, tokens_per_share;
  int64_t num_tiles;
  int num_narrow, num_ranks;
  int num_rank_tiles;  // tiles of 8 columns of narrow that see wide with dropout
  int num_stages;
  Dropout dropout;
  // Of a launch beside the kernel that makes narrow, and of the one behind both.
  const uint32_t* counts;  // blocks do nothing unless each is kArrivalsOfNarrow; null: do not look
  int num_counts;
  uint32_t* done;  // for each block, whether its part is there; null: do all
};

// At each count, see routed_gemm_plan.h.
constexpr uint32_t kArrivalsOfNarrow = 2;

// Columns of wide that a block owns; what it accumulates stays below 100 registers a thread.
CITI_HOST_DEVICE constexpr int FactorColumns(int tiles) { return tiles <= 6 ? 256 : 128; }

CITI_HOST_DEVICE constexpr int FactorStageBytes(int tiles) {
  return kFactorTokens * (RowBytes(FactorColumns(tiles)) + RowBytes(tiles * 8));
}

// One value and its neighbour in memory.
struct alignas(8) FloatPair {
  float first, second;
};

__device__ __forceinline__ void StorePair(float* to, float first, float second) {
  *reinterpret_cast<FloatPair*>(to) = {first, second};
}

// Where a lane points for a transposed operand whose rows, in memory, are the summed dimension.
__device__ __forceinline__ int LaneOffset(int row_bytes) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return lane % 16 * row_bytes + lane / 16 * kChunkBytes;
}

// Words of wideᵀ with dropped inputs set to zero: inputs k and k + 8, tokens t, t + 1, t + 8, t
// + 9.
__device__ __forceinline__ void DropInputsTransposed(const Dropout& dropout,
                                                     const uint32_t (&hashes)[4], int64_t k,
                                                     const uint32_t (&from)[4], uint32_t (&to)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t input = k + i % 2 * 8;
    to[i] = KeptOf(from[i], Keeps(dropout, hashes[i / 2 * 2], input),
                   Keeps(dropout, hashes[i / 2 * 2 + 1], input));
  }
}

// sums += wideᵀ narrow over the tokens of one stage; each warp has 16 kBlocks columns of wide.
template <class Element, int kTiles, bool kHasDropout, int kBlocks>
__device__ __forceinline__ void MultiplyFactorStage(const FactorLaunch& s,
                                                    const unsigned char* stage, int64_t first_token,
                                                    int64_t first_column,
                                                    float (&sums)[kBlocks][kTiles][4]) {
  constexpr int kWideBytes = RowBytes(FactorColumns(kTiles)), kNarrowBytes = RowBytes(kTiles * 8);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const unsigned char* wide = stage + (lane % 8 + lane / 16 * 8) * kWideBytes +
                              lane / 8 % 2 * kChunkBytes + warp * kBlocks * 16 * 2;
  const unsigned char* narrow = stage + kFactorTokens * kWideBytes + LaneOffset(kNarrowBytes);
#pragma unroll
  for (int t = 0; t < kFactorTokens; t += 16) {
    uint32_t of_wide[kBlocks][4], kept[kBlocks][4];
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
      LoadMatricesTransposed(of_wide[m], wide + t * kWideBytes + m * 16 * 2);
    }
    if constexpr (kHasDropout) {
      const int64_t token = first_token + t + 2 * (lane % 4);
      const uint32_t hashes[4] = {HashOfToken(s.dropout, token), HashOfToken(s.dropout, token + 1),
                                  HashOfToken(s.dropout, token + 8),
                                  HashOfToken(s.dropout, token + 9)};
      const int64_t column = first_column + warp * kBlocks * 16 + lane / 4;
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        DropInputsTransposed(s.dropout, hashes, column + m * 16, of_wide[m], kept[m]);
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t of_narrow[4];
      LoadMatricesTransposed(of_narrow, narrow + t * kNarrowBytes + n * 16);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
          if (kHasDropout && n + i < s.num_rank_tiles) {
            MultiplyAdd<Element>(sums[m][n + i], kept[m], of_narrow[2 * i], of_narrow[2 * i + 1]);
          } else {
            MultiplyAdd<Element>(sums[m][n + i], of_wide[m], of_narrow[2 * i],
                                 of_narrow[2 * i + 1]);
          }
        }
      }
    }
  }
}

// Columns of wide times columns of b, of which this warp has 16 tokens and 16 ranks.
constexpr int kUpSteps = FactorColumns(kUpTiles) / 16;

// b [columns of this block, 32 ranks] through shared memory to the registers of its operands.
__device__ __forceinline__ void LoadB(const FactorLaunch& s, int64_t first_column,
                                      unsigned char* memory, uint32_t (&of_b)[kUpSteps][4]) {
  constexpr int kRanks = kUpTiles * 8, kBytes = RowBytes(kRanks);
  for (int i = static_cast<int>(threadIdx.x); i < FactorColumns(kUpTiles) * kRanks;
       i += kFactorThreads) {
    const int row = i / kRanks, r = i % kRanks;
    const bool is_inside = first_column + row < s.num_columns && r < s.num_ranks;
    *reinterpret_cast<uint16_t*>(memory + row * kBytes + r * 2) =
        is_inside ? s.b[(first_column + row) * s.num_ranks + r] : uint16_t{0};
  }
  __syncthreads();
  const int half = static_cast<int>(threadIdx.x) / 128;
#pragma unroll
  for (int k = 0; k < kUpSteps; ++k) {
    LoadMatricesTransposed(of_b[k], memory + k * 16 * kBytes + half * 32 + LaneOffset(kBytes));
  }
}

// This block's part of du for the tokens of one stage.
template <class Element>
__device__ __forceinline__ void StoreRankGradients(const FactorLaunch& s,
                                                   const unsigned char* stage, int64_t tile,
                                                   int64_t first_token, int64_t end,
                                                   const uint32_t (&of_b)[kUpSteps][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int first_row = warp % 4 * 16, half = warp / 4;
  constexpr int kBytes = RowBytes(FactorColumns(kUpTiles));
  const unsigned char* wide = stage + first_row * kBytes + LaneOffset(kBytes);
  float sums[2][4] = {};
#pragma unroll
  for (int k = 0; k < kUpSteps; ++k) {
    uint32_t of_wide[4];
    LoadMatrices(of_wide, wide + k * 16 * 2);
    MultiplyAdd<Element>(sums[0], of_wide, of_b[k][0], of_b[k][1]);
    MultiplyAdd<Element>(sums[1], of_wide, of_b[k][2], of_b[k][3]);
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int r = half * 16 + n * 8 + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t t = first_token + first_row + lane / 4 + i * 8;
      if (t < end && r < s.num_narrow) {
        StorePair(s.du + (tile * s.num_tokens + t) * s.num_narrow + r, sums[n][2 * i],
                  sums[n][2 * i + 1]);
      }
    }
  }
}

template <int kTiles, bool kHasDropout, int kBlocks>
__device__ __forceinline__ void StoreParts(const FactorLaunch& s, int64_t share,
                                           int64_t first_column,
                                           const float (&sums)[kBlocks][kTiles][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int v = n * 8 + 2 * (lane % 4);
      const float scale = kHasDropout && n < s.num_rank_tiles ? s.dropout.inverse_keep : 1.0f;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t column = first_column + (warp * kBlocks + m) * 16 + lane / 4 + i * 8;
        if (column < s.num_columns && v < s.num_narrow) {
          StorePair(s.parts + (share * s.num_columns + column) * s.num_narrow + v,
                    sums[m][n][2 * i] * scale, sums[m][n][2 * i + 1] * scale);
        }
      }
    }
  }
}

// Whether this block has nothing to do: all of narrow is not there yet, so that the launch behind
// does its part; or it was done by the launch before. Nobody waits.
__device__ __forceinline__ bool IsSkipped(const FactorLaunch& s) {
  if (s.done == nullptr) return false;
  if (s.counts == nullptr) return s.done[blockIdx.x] != 0;
  bool is_there = true;
  for (int i = static_cast<int>(threadIdx.x); i < s.num_counts; i += kFactorThreads) {
    is_there = is_there && LoadCount(s.counts + i) >= kArrivalsOfNarrow;
  }
  if (!__syncthreads_and(is_there)) return true;
  if (threadIdx.x == 0) s.done[blockIdx.x] = 1;
  return false;
}

// Grid: shares of the tokens * tiles of columns.
template <class Element, int kTiles, bool kGivesRanks, bool kHasDropout>
__global__ void __launch_bounds__(kFactorThreads, 1) FactorGradients(const FactorLaunch s) {
  constexpr int kColumns = FactorColumns(kTiles), kBytes = FactorStageBytes(kTiles);
  if (IsSkipped(s)) return;
  unsigned char* memory = SharedMemory();
  const int64_t tile = blockIdx.x % s.num_tiles, share = blockIdx.x / s.num_tiles;
  const int64_t first_column = tile * kColumns, first = share * s.tokens_per_share;
  const int64_t end =
      first + s.tokens_per_share < s.num_tokens ? first + s.tokens_per_share : s.num_tokens;
  const auto copy = [&](int64_t token, int slot) {
    unsigned char* stage = memory + slot * kBytes;
    CopyTile<kFactorTokens, kColumns, kFactorThreads>(
        stage, s.wide + token * s.wide_stride + first_column, s.wide_stride, end - token,
        s.num_columns - first_column);
    CopyTile<kFactorTokens, kTiles * 8, kFactorThreads>(stage + kFactorTokens * RowBytes(kColumns),
                                                        s.narrow + token * s.narrow_stride,
                                                        s.narrow_stride, end - token, s.num_narrow);
  };
  const int64_t ahead = int64_t{kFactorTokens} * (s.num_stages - 1);
  for (int i = 0; i < s.num_stages - 1; ++i) {
    if (first + i * kFactorTokens < end) copy(first + i * kFactorTokens, i);
    CommitCopies();
  }
  int slot = 0, free_slot = s.num_stages - 1;
  uint32_t of_b[kGivesRanks ? kUpSteps : 1][4];
  if constexpr (kGivesRanks) LoadB(s, first_column, memory + free_slot * kBytes, of_b);
  float sums[kColumns / 128][kTiles][4] = {};
  for (int64_t t = first; t < end; t += kFactorTokens) {
    WaitForOldest(s.num_stages);
    __syncthreads();
    if (t + ahead < end) copy(t + ahead, free_slot);
    CommitCopies();
    const unsigned char* stage = memory + slot * kBytes;
    MultiplyFactorStage<Element, kTiles, kHasDropout>(s, stage, t, first_column, sums);
    if constexpr (kGivesRanks) StoreRankGradients<Element>(s, stage, tile, t, end, of_b);
    free_slot = slot;
    slot = slot + 1 == s.num_stages ? 0 : slot + 1;
  }
  StoreParts<kTiles, kHasDropout>(s, share, first_column, sums);
}

}  // namespace citi
