// MOLoRA's forward for up to 16 tokens in fp32, as when a batch generates: a lane for each token.
//
// Rows of the parameters are read where they lie, once, a number at a time for all tokens. A product
// of the linear layer so takes what its multiplications or its memory take; libraries that pack
// their operands take twice that for so few tokens.
#pragma once

#include <type_traits>

#include "cpu/molora_rank_space.h"
#include "whole_numbers.h"

namespace citi {
namespace {

// Rows whose sums fill the registers, with the tokens and a number of a row; and the number of
// tokens from which this is faster than molora_few_tokens.h, as timed with AVX2 alone: elsewhere it
// takes what that leaves.
#if defined(CITI_AVX512)
constexpr int kLaneRows = 8;
constexpr int64_t kNumInLanes = kFewTokens + 1;
#elif defined(CITI_AVX2)
constexpr int kLaneRows = 4;
constexpr int64_t kNumInLanes = kFewestInLanes;
#else
constexpr int kLaneRows = 2;
constexpr int64_t kNumInLanes = kFewTokens + 1;
#endif
static_assert(kNumInLanes >= kFewestInLanes && kNumInLanes <= kFewTokens + 1);
// Numbers of a row that are summed before they meet the others, for the rounding of long rows.
constexpr int64_t kLaneDepth = 128;
// Multiplications of a task: fewer are not worth a second thread.
constexpr int64_t kLaneProductsPerTask = int64_t{1} << 18;
// Columns of x of a task.
constexpr int64_t kPackedColumns = 256;
static_assert(kLanes == kLaneTokens, "a lane for each token");

// sums[i] += the n numbers of row i times the tokens, lanes[k] at a time; the rows behind these,
// which come next, are fetched meanwhile.
template <int kRows>
CITI_NEVER_INLINE void AddLanes(const float* rows, int64_t row_stride, const float* lanes,
                                int64_t n, Floats (&sums)[kRows]) {
  Floats parts[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) parts[i] = Floats::Zero();
  for (int64_t k = 0; k < n;) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) Prefetch(rows + (i + kRows) * row_stride + k);
    for (const int64_t end = Min(k + kLanes, n); k < end; ++k) {
      const Floats tokens = Floats::Load(lanes + k * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        parts[i] = MultiplyAdd(Floats::Broadcast(rows[i * row_stride + k]), tokens, parts[i]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) sums[i] = sums[i] + parts[i];
}

// The same for rows [first, first + kRows) of a matrix of n columns, of any strides and dtype.
template <int kRows>
void AddRows(const Matrix& matrix, int64_t first, const float* lanes, int64_t n,
             Floats (&sums)[kRows]) {
  const bool is_direct = matrix.dtype == DType::kFloat32 && matrix.column_stride == 1;
  float copied[kRows * kLaneDepth];
  for (int64_t k = 0; k < n; k += kLaneDepth) {
    const int64_t width = Min(kLaneDepth, n - k);
    const int64_t at = first * matrix.row_stride + k * matrix.column_stride;
    if (is_direct) {
      AddLanes(static_cast<const float*>(matrix.data) + at, matrix.row_stride, lanes + k * kLanes,
               width, sums);
      continue;
    }
    const auto copy = [&](const auto* numbers) {
      for (int i = 0; i < kRows; ++i) {
        for (int64_t j = 0; j < width; ++j) {
          copied[i * kLaneDepth + j] =
              ToFloat(numbers[at + i * matrix.row_stride + j * matrix.column_stride]);
        }
      }
    };
    if (matrix.dtype == DType::kFloat32) {
      copy(static_cast<const float*>(matrix.data));
    } else {
      copy(static_cast<const BFloat16*>(matrix.data));
    }
    AddLanes(copied, kLaneDepth, lanes + k * kLanes, width, sums);
  }
}

class ForwardInLanes {
 public:
  explicit ForwardInLanes(const MoloraForward& forward)
      : forward_(forward),
        sizes_(forward.sizes),
        x_(static_cast<float*>(forward.workspace.data)),
        u_(x_ + sizes_.num_in * kLanes),
        z_(u_ + sizes_.stacked_rank * kLanes) {}

  int64_t NumPackTasks() const { return CeilDiv(sizes_.num_in, kPackedColumns); }
  void Pack(int64_t task) const {
    const int64_t end = Min((task + 1) * kPackedColumns, sizes_.num_in);
    const float* x = static_cast<const float*>(forward_.x.data);
    for (int64_t t = 0; t < kLanes; ++t, x += forward_.x.row_stride) {
      for (int64_t k = task * kPackedColumns; k < end; ++k) {
        x_[k * kLanes + t] = t < sizes_.num_tokens ? x[k * forward_.x.column_stride] : 0.0f;
      }
    }
  }

  int64_t NumShrinkTasks() const { return CeilDiv(sizes_.num_rows(), ShrinkRows()); }
  void Shrink(int64_t task) const {
    const int64_t begin = task * ShrinkRows(), rank = sizes_.stacked_rank;
    const int64_t end = Min(begin + ShrinkRows(), sizes_.num_rows());
    const auto dot = [&](const Matrix& matrix, int64_t first, int64_t from, int64_t to) {
      ForTiles(from, to, [&](int64_t j, auto num_rows) {
        Floats sums[decltype(num_rows)::value];
        Clear(sums);
        AddRows(matrix, j - first, x_, sizes_.num_in, sums);
        ForEach(sums, [&](int64_t t, int64_t i, float sum) { Z(t)[j + i] = sum; });
      });
    };
    dot(forward_.a, 0, begin, Min(end, rank));
    dot(forward_.router, rank, begin < rank ? rank : begin, end);
  }

  int64_t NumRouteTasks() const { return Min(sizes_.num_tokens, 1); }
  void Route() const {
    for (int64_t i = 0; i < sizes_.stacked_rank * kLanes; ++i) u_[i] = 0.0f;
    for (int64_t t = 0; t < sizes_.num_tokens; ++t) {
      citi::Route<float>(forward_, Z(t), Z(t) + sizes_.stacked_rank, t,
                         [=](int64_t j, float number) { u_[j * kLanes + t] = number; });
    }
  }

  int64_t NumExpandTasks() const { return CeilDiv(sizes_.num_out, ExpandRows()); }
  void Expand(int64_t task) const {
    const float* bias = static_cast<const float*>(forward_.bias.data);
    const int64_t end = Min((task + 1) * ExpandRows(), sizes_.num_out);
    ForTiles(task * ExpandRows(), end, [&](int64_t n, auto num_rows) {
      Floats base[decltype(num_rows)::value], update[decltype(num_rows)::value];
      Clear(base);
      Clear(update);
      if (HasWeight()) AddRows(forward_.weight, n, x_, sizes_.num_in, base);
      AddRows(forward_.b, n, u_, sizes_.stacked_rank, update);
      for (int64_t i = 0; i < num_rows; ++i) {
        if (bias != nullptr) base[i] = base[i] + Floats::Broadcast(bias[n + i]);
        base[i] = base[i] + update[i];
      }
      ForEach(base, [&](int64_t t, int64_t i, float sum) {
        float* y = RowOf<float>(forward_.y, t) + n + i;
        *y = forward_.has_base ? *y + sum : sum;
      });
    });
  }

 private:
  bool HasWeight() const { return forward_.weight.data != nullptr; }
  float* Z(int64_t t) const { return z_ + t * sizes_.num_rows(); }

  int64_t ShrinkRows() const { return RowsPerTask(sizes_.num_in); }
  int64_t ExpandRows() const {
    return RowsPerTask(sizes_.stacked_rank + (HasWeight() ? sizes_.num_in : 0));
  }
  static int64_t RowsPerTask(int64_t num_columns) {
    const int64_t num_products = (num_columns > 0 ? num_columns : 1) * kLanes;
    return RoundUp(CeilDiv(kLaneProductsPerTask, num_products), kLaneRows);
  }

  // run(first row, number of rows) for tiles of the rows [begin, end)
  template <class Run>
  static void ForTiles(int64_t begin, int64_t end, const Run& run) {
    int64_t j = begin;
    for (; j + kLaneRows <= end; j += kLaneRows) run(j, std::integral_constant<int, kLaneRows>());
    for (; j < end; ++j) run(j, std::integral_constant<int, 1>());
  }

  template <int kRows>
  static void Clear(Floats (&sums)[kRows]) {
    for (Floats& each : sums) each = Floats::Zero();
  }

  // take(token, row of the tile, its sum)
  template <int kRows, class Take>
  void ForEach(const Floats (&sums)[kRows], const Take& take) const {
    float numbers[kRows * kLanes];
    for (int i = 0; i < kRows; ++i) sums[i].Store(numbers + i * kLanes);
    for (int64_t t = 0; t < sizes_.num_tokens; ++t) {
      for (int i = 0; i < kRows; ++i) take(t, i, numbers[i * kLanes + t]);
    }
  }

  const MoloraForward& forward_;
  const MoloraSizes& sizes_;
  float* x_;  // (K, 16)
  float* u_;  // (R, 16)
  float* z_;  // (T, R + G)
};

}  // namespace
}  // namespace citi
