// A ring of tiles in shared memory that cp.async fills while tensor cores work on an older one.
// Include behind tensor_core.h.
#pragma once

#include <cstdint>

#include "cuda/tensor_core.h"

namespace citi {

constexpr int kChunkBytes = 16;  // of one cp.async
constexpr int kChunk = 8;        // 16-bit elements
constexpr int kMinStages = 2;
constexpr int kMaxStages = 6;

// Bytes of a row of `columns` 16-bit elements: an odd number of chunks, so that the 8 rows of an
// ldmatrix lie in different banks.
CITI_HOST_DEVICE constexpr int RowBytes(int columns) {
  return columns / kChunk % 2 == 0 ? columns * 2 + kChunkBytes : columns * 2;
}

// Waits until the oldest of the num_stages - 1 groups under way has arrived.
__device__ __forceinline__ void WaitForOldest(int num_stages) {
  switch (num_stages) {
    case 2:
      return WaitForCopies<0>();
    case 3:
      return WaitForCopies<1>();
    case 4:
      return WaitForCopies<2>();
    case 5:
      return WaitForCopies<3>();
    default:
      return WaitForCopies<4>();
  }
}

// Copies kRows x kColumns elements to rows of RowBytes(kColumns); zeros beyond the matrix, of which
// only num_rows rows and num_columns columns (a multiple of 8) are left from `from` on.
template <int kRows, int kColumns, int kThreads>
__device__ __forceinline__ void CopyTile(unsigned char* to, const uint16_t* from, int64_t stride,
                                         int64_t num_rows, int64_t num_columns) {
  constexpr int kChunks = kColumns / kChunk;
#pragma unroll
  for (int i = 0; i < kRows * kChunks; i += kThreads) {
    const int at = i + static_cast<int>(threadIdx.x);
    if (kRows * kChunks % kThreads != 0 && at >= kRows * kChunks) break;
    const int row = at / kChunks, column = at % kChunks * kChunk;
    const bool is_valid = row < num_rows && column < num_columns;
    CopyAsync(to + row * RowBytes(kColumns) + column * 2,
              is_valid ? from + row * stride + column : from, is_valid);
  }
}

}  // namespace citi
