// What becomes of a tile of gᵀx: | gᵀx W | scale, and its sums. See parameter_scores_kernels.h.
//
// The tile goes through shared memory once, so that a warp has rows of it: the weight, and scores
// of elements, are read and written 32 neighbours at a time.
#pragma once

#include "cuda/parameter_scores_kernels.h"

namespace citi {

// Scores of one warp at a time: kRows rows, every kWarps-th, of kAcross columns for each lane.
template <class Tile>
struct WarpRows {
  static constexpr int kWarps = Tile::kThreads / 32;
  static constexpr int kRows = 2, kAcross = Tile::kSize / 32;

  int first_row, lane;
  float scores[kRows][kAcross];

  __device__ int row(int r) const { return first_row + r * kWarps; }
  __device__ int column(int m) const { return lane + 32 * m; }
  __device__ bool IsInside(const TilePlace& place, int r, int m) const {
    return row(r) < place.num_rows && column(m) < place.num_columns;
  }
};

// In shared memory; neighbouring rows' equal columns lie in different banks.
template <class Tile>
__device__ inline float* InSharedTile(int row, int column) {
  return reinterpret_cast<float*>(SharedMemory()) + row * Tile::kSize + (column ^ row % 4 * 8);
}

template <class Tile>
__device__ __forceinline__ void ShareGradient(const Elements<Tile>& sums) {
  const ThreadPlace<Tile> thread;
#pragma unroll
  for (int i = 0; i < Tile::kBlocksDown; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kBlocksAcross; ++j) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        float* to = InSharedTile<Tile>(thread.row(i) + 4 * e, thread.column() + 8 * j);
        const uint64_t second = BitsOfFloat(sums[i][j][e + 1]);
        *reinterpret_cast<uint64_t*>(to) = second << 32 | BitsOfFloat(sums[i][j][e]);
      }
    }
  }
  __syncthreads();
}

// Beyond the edge a zero may have met inf: that is selected away.
template <class Weight, class Tile>
__device__ __forceinline__ void Score(const ParameterScoresLaunch& p, const TilePlace& place,
                                      WarpRows<Tile>* rows) {
  using Rows = WarpRows<Tile>;
  const Weight* from = static_cast<const Weight*>(p.weight) + place.n * p.weight_stride_n +
                       place.k * p.weight_stride_k;
  // Together, so that their loads are in flight together.
  float weights[Rows::kRows][Rows::kAcross];
#pragma unroll
  for (int r = 0; r < Rows::kRows; ++r) {
#pragma unroll
    for (int m = 0; m < Rows::kAcross; ++m) {
      const int64_t at = rows->row(r) * p.weight_stride_n + rows->column(m) * p.weight_stride_k;
      weights[r][m] = rows->IsInside(place, r, m) ? ToFloat(from[at]) : 0.0f;
    }
  }
#pragma unroll
  for (int r = 0; r < Rows::kRows; ++r) {
#pragma unroll
    for (int m = 0; m < Rows::kAcross; ++m) {
      const float gradient = *InSharedTile<Tile>(rows->row(r), rows->column(m));
      const float score = fabsf(gradient * weights[r][m]) * p.scale;
      rows->scores[r][m] = rows->IsInside(place, r, m) ? score : 0.0f;
    }
  }
}

__device__ inline double Sum(double before, float added, int64_t, int64_t, uint64_t) {
  return before + static_cast<double>(added);
}
__device__ inline float Sum(float before, float added, int64_t, int64_t, uint64_t) {
  return before + added;
}
__device__ inline BFloat16 Sum(BFloat16 before, float added, int64_t n, int64_t k, uint64_t seed) {
  const uint32_t of_row = HashOfRow(static_cast<uint32_t>(n), seed);
  return RoundedStochastically(ToFloat(before) + added,
                               RandomBits(of_row, static_cast<uint32_t>(k)));
}

template <class Value, class Tile>
__device__ __forceinline__ void AddElements(const ParameterScoresLaunch& p, const TilePlace& place,
                                            const WarpRows<Tile>& rows) {
  using Rows = WarpRows<Tile>;
  const int64_t num_in = p.x.num_features;
  Value* scores = static_cast<Value*>(p.scores) + place.n * num_in + place.k;
  Value before[Rows::kRows][Rows::kAcross];
#pragma unroll
  for (int r = 0; r < Rows::kRows; ++r) {
#pragma unroll
    for (int m = 0; m < Rows::kAcross; ++m) {
      const int64_t at = rows.row(r) * num_in + rows.column(m);
      before[r][m] = rows.IsInside(place, r, m) ? scores[at] : Value{};
    }
  }
#pragma unroll
  for (int r = 0; r < Rows::kRows; ++r) {
#pragma unroll
    for (int m = 0; m < Rows::kAcross; ++m) {
      if (!rows.IsInside(place, r, m)) continue;
      scores[rows.row(r) * num_in + rows.column(m)] = Sum(
          before[r][m], rows.scores[r][m], place.n + rows.row(r), place.k + rows.column(m), p.seed);
    }
  }
}

// Every lane gets it.
__device__ inline float SumOverWarp(float value) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

template <class Tile>
__device__ __forceinline__ void StoreRowSums(const ParameterScoresLaunch& p, const TilePlace& place,
                                             const WarpRows<Tile>& rows) {
  float* const to = p.parts + place.across * p.g.num_features + place.n;
#pragma unroll
  for (int r = 0; r < WarpRows<Tile>::kRows; ++r) {
    float sum = 0.0f;
#pragma unroll
    for (const float score : rows.scores[r]) sum += score;
    sum = SumOverWarp(sum);
    if (rows.lane == 0 && rows.row(r) < place.num_rows) to[rows.row(r)] = sum;
  }
}

// to[0 .. size) = sums of the warps' rows of warp_sums (kWarps, kPitch), one warp after the other.
template <int kWarps, int kPitch>
__device__ inline void StoreSumsOfWarps(const float* warp_sums, int size, float* to) {
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < size; i += 32 * kWarps) {
    float sum = warp_sums[i];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) sum += warp_sums[warp * kPitch + i];
    to[i] = sum;
  }
}

// sums: of each lane's columns over the rows of its warp.
template <class Tile>
__device__ __forceinline__ void StoreColumnSums(const ParameterScoresLaunch& p,
                                                const TilePlace& place,
                                                const float (&sums)[WarpRows<Tile>::kAcross]) {
  constexpr int kWarps = WarpRows<Tile>::kWarps;
  float* const warp_sums = reinterpret_cast<float*>(SharedMemory());
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  // The tile, which lies there, has been read.
  __syncthreads();
  if (p.granularity == Granularity::kComponent) {
    float sum = 0.0f;
#pragma unroll
    for (const float of_column : sums) sum += of_column;
    sum = SumOverWarp(sum);
    if (lane == 0) warp_sums[warp] = sum;
    return StoreSumsOfWarps<kWarps, 1>(warp_sums, 1, p.parts + blockIdx.x);
  }
#pragma unroll
  for (int m = 0; m < WarpRows<Tile>::kAcross; ++m) {
    warp_sums[warp * Tile::kSize + lane + 32 * m] = sums[m];
  }
  StoreSumsOfWarps<kWarps, Tile::kSize>(warp_sums, place.num_columns,
                                        p.parts + place.down * p.x.num_features + place.k);
}

template <class Weight, class Tile>
__device__ __forceinline__ void Reduce(const ParameterScoresLaunch& p, const TilePlace& place) {
  using Rows = WarpRows<Tile>;
  Rows rows;
  rows.lane = static_cast<int>(threadIdx.x) % 32;
  float sums[Rows::kAcross] = {};
  const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll 1
  for (rows.first_row = warp; rows.first_row < Tile::kSize;
       rows.first_row += Rows::kWarps * Rows::kRows) {
    Score<Weight, Tile>(p, place, &rows);
    if (p.granularity == Granularity::kRows) {
      StoreRowSums<Tile>(p, place, rows);
    } else if (p.granularity != Granularity::kElements) {
#pragma unroll
      for (int m = 0; m < Rows::kAcross; ++m) {
#pragma unroll
        for (int r = 0; r < Rows::kRows; ++r) sums[m] += rows.scores[r][m];
      }
    } else if (p.scores_dtype == DType::kFloat64) {
      AddElements<double, Tile>(p, place, rows);
    } else if (p.scores_dtype == DType::kFloat32) {
      AddElements<float, Tile>(p, place, rows);
    } else {
      AddElements<BFloat16, Tile>(p, place, rows);
    }
  }
  if (p.granularity == Granularity::kComponent || p.granularity == Granularity::kColumns) {
    StoreColumnSums<Tile>(p, place, sums);
  }
}

// Blocks of a multiprocessor. Loads that nothing waits for later need registers more than other
// blocks; so do large tiles of fp32, which have sums of a stage beside those of all tokens.
template <class Element, class Tile, class Rows>
constexpr int kMinBlocksOf =
    Rows::kIsAsynchronous && (sizeof(Element) == 2 || Tile::kSize < 128) ? Tile::kMinBlocks : 1;

// Grid: tiles.
template <class Element, class Tile, class Rows>
__global__ void __launch_bounds__(Tile::kThreads, kMinBlocksOf<Element, Tile, Rows>)
    ScoresOfTile(const ParameterScoresLaunch p) {
  const TilePlace place = PlaceOf<Tile>(p, blockIdx.x);
  {
    Elements<Tile> sums = {};
    if (p.is_per_token) {
      Gradient<Element, Tile, Rows, true>(p, place, sums);
    } else {
      Gradient<Element, Tile, Rows, false>(p, place, sums);
    }
    ShareGradient<Tile>(sums);
  }
  if (p.weight_dtype == DType::kFloat32) {
    Reduce<float, Tile>(p, place);
  } else if (p.weight_dtype == DType::kBFloat16) {
    Reduce<BFloat16, Tile>(p, place);
  } else {
    Reduce<Float16, Tile>(p, place);
  }
}

// scores[s] += Σ_c Σ_{l < length} parts[c, s * length + l], in fp64. Grid: tiles of `segments`
// scores; kSumThreads / segments threads, a power of two, share the summands of each.
template <class Value>
__global__ void __launch_bounds__(kSumThreads)
    AddScoreSums(const float* parts, Value* scores, int64_t num_summands, int64_t num_scores,
                 int64_t length, int segments) {
  __shared__ double sums[kSumThreads];
  const int in_tile = static_cast<int>(threadIdx.x) % segments;
  const int first = static_cast<int>(threadIdx.x) / segments;
  const int step = kSumThreads / segments;
  const int64_t s = static_cast<int64_t>(blockIdx.x) * segments + in_tile;
  double total = 0.0;
  if (s < num_scores) {
    for (int64_t m = first; m < num_summands; m += step) {
      total += static_cast<double>(parts[(m / length * num_scores + s) * length + m % length]);
    }
  }
  sums[threadIdx.x] = total;
  __syncthreads();
  for (int width = step / 2; width > 0; width /= 2) {
    if (first < width) sums[threadIdx.x] += sums[threadIdx.x + width * segments];
    __syncthreads();
  }
  if (first == 0 && s < num_scores) {
    scores[s] = static_cast<Value>(static_cast<double>(scores[s]) + sums[in_tile]);
  }
}

}  // namespace citi
