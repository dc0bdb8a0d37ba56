// Device code of the input gradient's update with dropout, in place and in one pass over dx:
//
//   dx[t, k] += Σ_r dh[t, r] · a[r, k] / (1 - p)   where dropout keeps x[t, k], 0 where not
//             + Σ_g dlogits[t, g] · router[g, k]
//
// A block owns 64 tokens and 128 inputs. Many of them on a multiprocessor hide each other's loads.
// Also compiled as plain C++ by a test. T tokens, K in-features, R_pad and Z as in
// skinny_arguments.h.
#pragma once

#include "cuda/pipeline.h"
#include "dropout.h"

namespace citi {

constexpr int kInputThreads = 256;
constexpr int kInputTokens = 64;
constexpr int kInputColumns = 128;
constexpr int kInputTiles = kInputColumns / 16;  // of 8 columns, of one warp

struct InputLaunch {
  uint16_t* dx;           // (T, K), rows dx_stride apart
  const uint16_t* dz;     // (T, Z)
  const uint16_t* stack;  // (Z, K)
  int64_t num_tokens, num_inputs, dx_stride, num_tiles;
  int padded_ranks, num_rows;
  bool has_base;  // else dx is written
  Dropout dropout;
};

CITI_HOST_DEVICE constexpr int UpToSixteen(int size) { return (size + 15) / 16 * 16; }

// Rows of the stack in shared memory: ranks, zeros up to a multiple of 16, gates, zeros.
CITI_HOST_DEVICE constexpr int StackedRows(int padded_ranks, int num_rows) {
  return UpToSixteen(padded_ranks) + UpToSixteen(num_rows - padded_ranks);
}

CITI_HOST_DEVICE constexpr int InputSharedBytes(int padded_ranks, int num_rows) {
  return (kInputTokens + StackedRows(padded_ranks, num_rows)) * RowBytes(kInputColumns) +
         kInputTokens * RowBytes(StackedRows(padded_ranks, num_rows));
}

// Where row i of the stack in shared memory comes from; num_rows: it is zero.
__device__ __forceinline__ int SourceRow(const InputLaunch& s, int i) {
  const int gate = i - UpToSixteen(s.padded_ranks);
  if (gate < 0) return i < s.padded_ranks ? i : s.num_rows;
  return gate < s.num_rows - s.padded_ranks ? s.padded_ranks + gate : s.num_rows;
}

__device__ __forceinline__ void CopyInputTiles(const InputLaunch& s, int64_t first_token,
                                               int64_t first_column, unsigned char* dx,
                                               unsigned char* stack, unsigned char* dz) {
  const int64_t tokens_left = s.num_tokens - first_token,
                columns_left = s.num_inputs - first_column;
  const int rows = StackedRows(s.padded_ranks, s.num_rows), thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < rows * (kInputColumns / kChunk); i += kInputThreads) {
    const int row = i / (kInputColumns / kChunk), column = i % (kInputColumns / kChunk) * kChunk;
    const int source = SourceRow(s, row);
    const bool is_valid = source < s.num_rows && column < columns_left;
    const uint16_t* from = s.stack + source * s.num_inputs + first_column + column;
    CopyAsync(stack + row * RowBytes(kInputColumns) + column * 2, is_valid ? from : s.stack,
              is_valid);
  }
  for (int i = thread; i < kInputTokens * (rows / kChunk); i += kInputThreads) {
    const int t = i / (rows / kChunk), column = i % (rows / kChunk) * kChunk;
    const int source = SourceRow(s, column);
    const bool is_valid = source < s.num_rows && t < tokens_left;
    CopyAsync(dz + t * RowBytes(rows) + column * 2,
              is_valid ? s.dz + (first_token + t) * s.num_rows + source : s.dz, is_valid);
  }
  if (s.has_base) {
    CopyTile<kInputTokens, kInputColumns, kInputThreads>(
        dx, s.dx + first_token * s.dx_stride + first_column, s.dx_stride, tokens_left,
        columns_left);
  }
  CommitCopies();
  WaitForCopies<0>();
  __syncthreads();
}

// sums += dz · stack over rows [begin, end) of the stack in shared memory.
template <class Element>
__device__ __forceinline__ void MultiplyRows(const unsigned char* dz, int dz_bytes,
                                             const unsigned char* stack, int begin, int end,
                                             float (&sums)[kInputTiles][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const unsigned char* left = dz + (warp % 4 * 16 + lane % 16) * dz_bytes + lane / 16 * kChunkBytes;
  const unsigned char* right = stack + lane % 16 * RowBytes(kInputColumns) +
                               lane / 16 * kChunkBytes + warp / 4 * kInputTiles * kChunkBytes;
  for (int row = begin; row < end; row += 16) {
    uint32_t of_dz[4];
    LoadMatrices(of_dz, left + row * 2);
#pragma unroll
    for (int n = 0; n < kInputTiles; n += 2) {
      uint32_t of_stack[4];
      LoadMatricesTransposed(of_stack, right + row * RowBytes(kInputColumns) + n * kChunkBytes);
      MultiplyAdd<Element>(sums[n], of_dz, of_stack[0], of_stack[1]);
      MultiplyAdd<Element>(sums[n + 1], of_dz, of_stack[2], of_stack[3]);
    }
  }
}

// Token and column of this thread's first sum; its others lie 8 tokens or 8 n columns further.
struct Corner {
  int token, column;
};

__device__ __forceinline__ Corner CornerOfThread() {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  return {warp % 4 * 16 + lane / 4, warp / 4 * kInputTiles * 8 + 2 * (lane % 4)};
}

__device__ __forceinline__ void DropSums(const InputLaunch& s, int64_t first_token,
                                         int64_t first_column, float (&sums)[kInputTiles][4]) {
  const Corner corner = CornerOfThread();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t hash = HashOfToken(s.dropout, first_token + corner.token + i / 2 * 8);
#pragma unroll
    for (int n = 0; n < kInputTiles; ++n) {
      const bool keeps = Keeps(s.dropout, hash, first_column + corner.column + n * 8 + i % 2);
      sums[n][i] = keeps ? sums[n][i] * s.dropout.inverse_keep : 0.0f;
    }
  }
}

// Adds the sums to the tile of dx in shared memory, or writes them there.
template <class Element>
__device__ __forceinline__ void AddToTile(const InputLaunch& s, unsigned char* dx,
                                          const float (&sums)[kInputTiles][4]) {
  const Corner corner = CornerOfThread();
#pragma unroll
  for (int n = 0; n < kInputTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      auto* word = reinterpret_cast<uint32_t*>(
          dx + (corner.token + i * 8) * RowBytes(kInputColumns) + (corner.column + n * 8) * 2);
      float first = sums[n][2 * i], second = sums[n][2 * i + 1];
      if (s.has_base) {
        first += ToFloat(Element{static_cast<uint16_t>(*word & 0xffffu)});
        second += ToFloat(Element{static_cast<uint16_t>(*word >> 16)});
      }
      *word = Pack<Element>(first, second);
    }
  }
}

// Grid: blocks of tokens * tiles of columns.
template <class Element>
__global__ void __launch_bounds__(kInputThreads) UpdateInputGradient(const InputLaunch s) {
  const int rows = StackedRows(s.padded_ranks, s.num_rows);
  unsigned char* dx = SharedMemory();
  unsigned char* stack = dx + kInputTokens * RowBytes(kInputColumns);
  unsigned char* dz = stack + rows * RowBytes(kInputColumns);
  const int64_t first_token = blockIdx.x / s.num_tiles * kInputTokens;
  const int64_t first_column = blockIdx.x % s.num_tiles * kInputColumns;
  CopyInputTiles(s, first_token, first_column, dx, stack, dz);
  float sums[kInputTiles][4] = {};
  MultiplyRows<Element>(dz, RowBytes(rows), stack, 0, UpToSixteen(s.padded_ranks), sums);
  DropSums(s, first_token, first_column, sums);
  MultiplyRows<Element>(dz, RowBytes(rows), stack, UpToSixteen(s.padded_ranks), rows, sums);
  AddToTile<Element>(s, dx, sums);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kInputTokens * (kInputColumns / kChunk);
       i += kInputThreads) {
    const int t = i / (kInputColumns / kChunk), column = i % (kInputColumns / kChunk) * kChunk;
    if (first_token + t < s.num_tokens && first_column + column < s.num_inputs) {
      *reinterpret_cast<uint4*>(s.dx + (first_token + t) * s.dx_stride + first_column + column) =
          *reinterpret_cast<const uint4*>(dx + t * RowBytes(kInputColumns) + column * 2);
    }
  }
}

}  // namespace citi
