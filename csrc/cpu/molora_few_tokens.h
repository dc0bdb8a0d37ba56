// MOLoRA's forward for a few tokens, as when text is generated: rows of the parameters are read
// where they lie, once for each token. Panels would cost more than the products. Rows of the linear
// layer, where it is computed here too, are read once for all tokens, at what memory gives.
#pragma once

#include <type_traits>

#include "cpu/molora_rank_space.h"
#include "whole_numbers.h"

namespace citi {
namespace {

// Rows at once, for the latency of the additions.
constexpr int64_t kDotRows = 4;
// Rows of weight that meet up to four tokens together, by the registers that there are.
#if defined(CITI_AVX512)
constexpr int kWeightRows = 4;
#else
constexpr int kWeightRows = 2;
#endif
// Multiplications of a task: fewer are not worth a second thread.
constexpr int64_t kDotsPerTask = int64_t{1} << 15;

// Sixteen numbers of a row, or the n that are left and zeros; rounded to X.
template <class X, class Number>
CITI_ALWAYS_INLINE Floats LoadRounded(const Number* from, int64_t stride, int64_t n) {
  if (stride == 1 && n >= kLanes) {
    const Floats numbers = Floats::Load(from);
    if constexpr (sizeof(X) >= sizeof(Number)) return numbers;
    alignas(64) X rounded[kLanes];
    numbers.Store(rounded);
    return Floats::Load(rounded);
  }
  alignas(64) float numbers[kLanes] = {};
  for (int64_t i = 0; i < Min(n, kLanes); ++i) numbers[i] = Singles<X>::Of(from[i * stride]);
  return Floats::Load(numbers);
}

// sums[i] = <row i, vector>; the rows are rounded to X
template <class X, int kRows, class Number, class Entry>
CITI_NEVER_INLINE void DotRows(const Number* rows, int64_t row_stride, int64_t stride,
                               const Entry* vector, int64_t vector_stride, int64_t n, float* sums) {
  Floats parts[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) parts[i] = Floats::Zero();
  for (int64_t k = 0; k < n; k += kLanes) {
    const Floats entries = LoadRounded<Entry>(vector + k * vector_stride, vector_stride, n - k);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Number* from = rows + i * row_stride + k * stride;
      parts[i] = MultiplyAdd(LoadRounded<X>(from, stride, n - k), entries, parts[i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) sums[i] = parts[i].Sum();
}

// parts[t][i] += the sixteen numbers of row i times those of token t, read by load(row or token).
// The rows of the next tile are fetched meanwhile: CPUs do not foresee streams that end soon.
template <class X, int kRows, int kTokens, class Load>
CITI_ALWAYS_INLINE void AddProducts(const X* rows, int64_t row_stride, const X* tokens,
                                    int64_t token_stride, const Load& load,
                                    Floats (&parts)[kTokens][kRows]) {
  Floats weights[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    weights[i] = load(rows + i * row_stride);
    Prefetch(rows + (i + kRows) * row_stride);
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
    const Floats entries = load(tokens + t * token_stride);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) parts[t][i] = MultiplyAdd(weights[i], entries, parts[t][i]);
  }
}

// sums[t * sums_stride + i] = <row i, token t>, each one chain of sixteen lanes: the same bits in
// a tile of any size.
template <class X, int kRows, int kTokens>
CITI_NEVER_INLINE void MultiplyTile(const X* rows, int64_t row_stride, const X* tokens,
                                    int64_t token_stride, int64_t n, float* sums,
                                    int64_t sums_stride) {
  Floats parts[kTokens][kRows];
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) parts[t][i] = Floats::Zero();
  }
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) {
    AddProducts(
        rows + k, row_stride, tokens + k, token_stride,
        [](const X* from) { return Floats::Load(from); }, parts);
  }
  if (k < n) {
    AddProducts(
        rows + k, row_stride, tokens + k, token_stride,
        [=](const X* from) { return LoadTail<Floats>(from, n - k); }, parts);
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) sums[t * sums_stride + i] = parts[t][i].Sum();
  }
}

template <class X>
class ForwardOfFew {
 public:
  explicit ForwardOfFew(const MoloraForward& forward)
      : forward_(forward),
        sizes_(forward.sizes),
        z_(static_cast<float*>(forward.workspace.data)),
        u_(z_ + sizes_.num_tokens * sizes_.num_rows()) {}

  int64_t NumShrinkTasks() const {
    return CeilDiv(sizes_.num_rows(), RowsPerTask(sizes_.num_in));
  }
  void Shrink(int64_t task) const {
    const int64_t begin = task * RowsPerTask(sizes_.num_in), rank = sizes_.stacked_rank;
    const int64_t end = Min(begin + RowsPerTask(sizes_.num_in), sizes_.num_rows());
    for (int64_t t = 0; t < sizes_.num_tokens; ++t) {
      const X* x = static_cast<const X*>(forward_.x.data) + t * forward_.x.row_stride;
      float* z = z_ + t * sizes_.num_rows();
      const auto dot = [&](const Matrix& matrix, int64_t first, int64_t from, int64_t to) {
        Dot(matrix, from - first, to - from, x, forward_.x.column_stride, sizes_.num_in, z + from);
      };
      dot(forward_.a, 0, begin, Min(end, rank));
      dot(forward_.router, rank, begin < rank ? rank : begin, end);
    }
  }

  int64_t NumRouteTasks() const { return Min(sizes_.num_tokens, 1); }
  void Route() const {
    for (int64_t t = 0; t < sizes_.num_tokens; ++t) {
      const float* z = z_ + t * sizes_.num_rows();
      float* u = u_ + t * sizes_.stacked_rank;
      citi::Route<X>(forward_, z, z + sizes_.stacked_rank, t,
                     [=](int64_t j, float number) { u[j] = Singles<X>::Of(number); });
    }
  }

  int64_t NumExpandTasks() const {
    return CeilDiv(sizes_.num_out, NumExpandRows());
  }
  void Expand(int64_t task) const {
    float base[kFewTokens * kColumns], sums[kColumns];
    const int64_t end = Min((task + 1) * NumExpandRows(), sizes_.num_out);
    for (int64_t n = task * NumExpandRows(); n < end; n += kColumns) {
      const int64_t width = Min(kColumns, end - n);
      if (HasWeight()) MultiplyWeight(n, width, base);
      for (int64_t t = 0; t < sizes_.num_tokens; ++t) {
        Dot(forward_.b, n, width, u_ + t * sizes_.stacked_rank, 1, sizes_.stacked_rank, sums);
        X* y = RowOf<X>(forward_.y, t) + n;
        const auto store = [&](const auto& base_of) {
          for (int64_t i = 0; i < width; ++i) y[i] = Rounded<X>(base_of(i) + sums[i]);
        };
        if (HasWeight()) {
          store([&](int64_t i) { return base[t * kColumns + i]; });
        } else if (forward_.has_base) {
          store([&](int64_t i) { return ToFloat(y[i]); });
        } else {
          store([](int64_t) { return 0.0f; });
        }
      }
    }
  }

 private:
  static constexpr int64_t kColumns = 256;

  bool HasWeight() const { return forward_.weight.data != nullptr; }
  int64_t NumExpandRows() const {
    return RowsPerTask(sizes_.stacked_rank + (HasWeight() ? sizes_.num_in : 0));
  }

  // Columns first to first + width of weight x + bias, kColumns apart for each token.
  void MultiplyWeight(int64_t first, int64_t width, float* base) const {
    int64_t i = 0;
    for (; i + kWeightRows <= width; i += kWeightRows) {
      MultiplyRows<kWeightRows>(first + i, base + i);
    }
    for (; i < width; ++i) MultiplyRows<1>(first + i, base + i);
    if (forward_.bias.data == nullptr) return;
    const X* bias = static_cast<const X*>(forward_.bias.data) + first;
    for (int64_t t = 0; t < sizes_.num_tokens; ++t) {
      for (i = 0; i < width; ++i) base[t * kColumns + i] += ToFloat(bias[i]);
    }
  }
  template <int kRows>
  void MultiplyRows(int64_t first, float* base) const {
    const int64_t row_stride = forward_.weight.row_stride, x_stride = forward_.x.row_stride;
    const X* rows = static_cast<const X*>(forward_.weight.data) + first * row_stride;
    const X* x = static_cast<const X*>(forward_.x.data);
    int64_t t = 0;
    const auto multiply = [&](auto num_tokens) {
      MultiplyTile<X, kRows, num_tokens>(rows, row_stride, x + t * x_stride, x_stride,
                                         sizes_.num_in, base + t * kColumns, kColumns);
      t += num_tokens;
    };
    while (t + 4 <= sizes_.num_tokens) multiply(std::integral_constant<int, 4>());
    if (t + 2 <= sizes_.num_tokens) multiply(std::integral_constant<int, 2>());
    if (t < sizes_.num_tokens) multiply(std::integral_constant<int, 1>());
  }

  int64_t RowsPerTask(int64_t num_columns) const {
    const int64_t num_dots = num_columns * sizes_.num_tokens;
    return RoundUp(CeilDiv(kDotsPerTask, num_dots > 0 ? num_dots : 1), kDotRows);
  }

  // sums[i] = <row first + i of the matrix, vector>
  template <class Entry>
  static void Dot(const Matrix& matrix, int64_t first, int64_t num_rows, const Entry* vector,
                  int64_t vector_stride, int64_t n, float* sums) {
    const auto dot = [&](const auto* of_matrix) {
      const auto* rows = of_matrix + first * matrix.row_stride;
      int64_t i = 0;
      for (; i + kDotRows <= num_rows; i += kDotRows) {
        DotRows<X, kDotRows>(rows + i * matrix.row_stride, matrix.row_stride, matrix.column_stride,
                             vector, vector_stride, n, sums + i);
      }
      for (; i < num_rows; ++i) {
        DotRows<X, 1>(rows + i * matrix.row_stride, 0, matrix.column_stride, vector, vector_stride,
                      n, sums + i);
      }
    };
    if (matrix.dtype == DType::kFloat32) {
      dot(static_cast<const float*>(matrix.data));
    } else {
      dot(static_cast<const BFloat16*>(matrix.data));
    }
  }

  const MoloraForward& forward_;
  const MoloraSizes& sizes_;
  float* z_;  // (T, R + G)
  float* u_;  // (T, R)
};

}  // namespace
}  // namespace citi
