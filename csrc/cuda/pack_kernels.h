// Device code that lays small matrices out as the skinny passes and the GEMMs read them:
//
//   out (rows, columns) = each source from its first row and column 0 on, zeros elsewhere
//
// One launch casts, transposes, stacks and pads. Also compiled as plain C++ by a test.
#pragma once

#include <cstdint>

#include "cuda/pipeline.h"
#include "dtype.h"

namespace citi {

constexpr int kPackThreads = 128;
constexpr int kMaxPackSources = 2;
// Elements that a thread writes at once, 16 bytes.
constexpr int kPackElements = 8;

struct PackSource {
  const void* data;  // (rows, columns), any strides
  DType dtype;       // fp32, bf16 or fp16
  int64_t first_row, num_rows, num_columns, row_stride, column_stride;
};

struct PackLaunch {
  PackSource sources[kMaxPackSources];
  int num_sources;
  uint16_t* out;
  int64_t num_rows, chunks_of_row;
  uint32_t* zeros;  // num_zeros numbers that become 0
  int64_t num_zeros;
};

template <class Element, class Source>
__device__ inline void ReadRow(const PackSource& s, int64_t row, int64_t column,
                               Element (&values)[kPackElements]) {
  const Source* from = static_cast<const Source*>(s.data) + row * s.row_stride;
#pragma unroll
  for (int i = 0; i < kPackElements; ++i) {
    if (column + i < s.num_columns) {
      values[i] = Rounded<Element>(ToFloat(from[(column + i) * s.column_stride]));
    }
  }
}

// Grid: rows * chunks of 8 columns; a thread owns a chunk.
template <class Element>
__global__ void __launch_bounds__(kPackThreads) PackRows(const PackLaunch s) {
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
  // No more than chunks, as the plan sees to.
  if (chunk < s.num_zeros) s.zeros[chunk] = 0;
  const int64_t row = chunk / s.chunks_of_row;
  if (row >= s.num_rows) return;
  const int64_t column = chunk % s.chunks_of_row * kPackElements;
  alignas(16) Element values[kPackElements] = {};
#pragma unroll
  for (int j = 0; j < kMaxPackSources; ++j) {
    if (j == s.num_sources) break;
    const PackSource& source = s.sources[j];
    const int64_t in_source = row - source.first_row;
    if (in_source < 0 || in_source >= source.num_rows) continue;
    if (source.dtype == DType::kFloat32) ReadRow<Element, float>(source, in_source, column, values);
    if (source.dtype == DType::kBFloat16) {
      ReadRow<Element, BFloat16>(source, in_source, column, values);
    }
    if (source.dtype == DType::kFloat16) {
      ReadRow<Element, Float16>(source, in_source, column, values);
    }
  }
  *reinterpret_cast<uint4*>(s.out + chunk * kPackElements) = *reinterpret_cast<uint4*>(values);
}

}  // namespace citi
