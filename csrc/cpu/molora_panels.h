// Operands of tiles, packed: rows of any strides, fp32 or bf16, as words of consecutive lanes.
//
// A panel holds a right operand of `depth` words and any number of lanes: tiles of kTileLanes lanes
// one after another, the last one narrower; in a tile, depth after depth. What is beyond the
// operand is 0.
#pragma once

#include "cpu/tile_product.h"
#include "tensors.h"
#include "whole_numbers.h"

namespace citi {
namespace {

constexpr int64_t kWordsPerTask = 128;

template <class Words>
inline int64_t WordsOf(int64_t num_numbers) {
  return CeilDiv(num_numbers, Words::kNumbers);
}

// The rows of one matrix, or of two, one below the other.
struct Rows {
  Matrix first;
  int64_t num_first;
  Matrix second;
  int64_t num_rows;

  // function(row i, stride of its elements)
  template <class Function>
  inline void With(int64_t i, const Function& function) const {
    const Matrix& matrix = i < num_first ? first : second;
    const int64_t at = (i < num_first ? i : i - num_first) * matrix.row_stride;
    if (matrix.dtype == DType::kFloat32) {
      function(static_cast<const float*>(matrix.data) + at, matrix.column_stride);
    } else {
      function(static_cast<const BFloat16*>(matrix.data) + at, matrix.column_stride);
    }
  }
};

inline Rows AllRowsOf(const Matrix& matrix, int64_t num_rows = INT64_MAX) {
  return {matrix, num_rows, {}, num_rows};
}

// to[i * stride] = numbers begin + i of the row
template <class Words>
inline void CopyRow(const Rows& rows, int64_t row, int64_t begin, int64_t n,
                    typename Words::Number* to, int64_t stride) {
  rows.With(row, [=](const auto* from, int64_t from_stride) {
    if (from_stride == 1 && stride == 1) {
      for (int64_t i = 0; i < n; ++i) to[i] = Words::Of(from[begin + i]);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i * stride] = Words::Of(from[(begin + i) * from_stride]);
    }
  });
}

template <class Number>
inline void Fill(Number* to, int64_t stride, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i * stride] = Number{};
}

// Words [d, end) of a tile whose lanes are the rows from `lane` on, and its depth their columns.
template <class Words>
void PackRowsAsLanes(const Rows& rows, int64_t num_columns, int64_t lane, int64_t num_lanes,
                     int64_t d, int64_t end, typename Words::Number* tile) {
  constexpr int64_t n = Words::kNumbers;
  const int64_t last = Min(end * n, num_columns);
  for (int64_t j = 0; j < num_lanes; ++j) {
    const int64_t num_filled = lane + j < rows.num_rows ? last - d * n : 0;
    for (int64_t part = 0; part < n; ++part) {
      typename Words::Number* to = tile + j * n + part;
      const int64_t count = CeilDiv(num_filled - part, n);
      if (count > 0) {
        rows.With(lane + j, [&](const auto* from, int64_t stride) {
          for (int64_t i = 0; i < count; ++i) {
            to[i * num_lanes * n] = Words::Of(from[(d * n + part + i * n) * stride]);
          }
        });
      }
      const int64_t num_set = count > 0 ? count : 0;
      Fill(to + num_set * num_lanes * n, num_lanes * n, end - d - num_set);
    }
  }
}

#if defined(CITI_AVX512_BF16)
// Two rows of bf16 side by side into words; the second is null beyond the operand.
inline void InterleaveRows(const BFloat16* even, const BFloat16* odd, int64_t n, BFloat16* to) {
  const auto wide = [](const BFloat16* from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    __m512i pairs = wide(even + i);
    if (odd != nullptr) pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(wide(odd + i), 16));
    _mm512_storeu_si512(to + 2 * i, pairs);
  }
  for (; i < n; ++i) {
    to[2 * i] = even[i];
    to[2 * i + 1] = odd == nullptr ? BFloat16{} : odd[i];
  }
}
#endif

// Words [d, end) of a tile whose depth are the rows, and its lanes their columns from `lane` on.
template <class Words>
void PackRowsAsDepth(const Rows& rows, int64_t num_columns, int64_t lane, int64_t num_lanes,
                     int64_t d, int64_t end, typename Words::Number* tile) {
  constexpr int64_t n = Words::kNumbers;
  const int64_t num_filled = Min(num_lanes, num_columns - lane);
  for (; d < end; ++d, tile += num_lanes * n) {
    Fill(tile + num_filled * n, 1, (num_lanes - num_filled) * n);
#if defined(CITI_AVX512_BF16)
    if constexpr (n == 2) {
      const BFloat16* pair[2] = {};
      for (int64_t part = 0; part < n && d * n + part < rows.num_rows; ++part) {
        rows.With(d * n + part, [&](const auto* from, int64_t stride) {
          if constexpr (sizeof(*from) == sizeof(BFloat16)) {
            if (stride == 1) pair[part] = from + lane;
          }
        });
      }
      const bool is_last = d * n + 1 == rows.num_rows;
      if (pair[0] != nullptr && (pair[1] != nullptr || is_last)) {
        InterleaveRows(pair[0], pair[1], num_filled, tile);
        continue;
      }
    }
#endif
    for (int64_t part = 0; part < n; ++part) {
      if (d * n + part < rows.num_rows) {
        CopyRow<Words>(rows, d * n + part, lane, num_filled, tile + part, n);
      } else {
        Fill(tile + part, n, num_filled);
      }
    }
  }
}

// A panel to be packed, in tasks.
template <class Words>
struct Panel {
  Rows rows;
  int64_t num_columns;
  bool rows_are_lanes;
  typename Words::Number* to;

  int64_t num_lanes() const {
    return RoundUp(rows_are_lanes ? rows.num_rows : num_columns, kLanes);
  }
  int64_t depth() const { return WordsOf<Words>(rows_are_lanes ? num_columns : rows.num_rows); }
  int64_t size() const { return num_lanes() * depth(); }  // in words

  const typename Words::Number* Tile(int64_t lane) const {
    return to + lane * depth() * Words::kNumbers;
  }
  int64_t TileLanes(int64_t lane) const { return Min(kTileLanes, num_lanes() - lane); }

  int64_t NumTasks() const { return CeilDiv(num_lanes(), kTileLanes) * NumChunks(); }
  void Pack(int64_t task) const {
    const int64_t lane = task / NumChunks() * kTileLanes;
    const int64_t d = task % NumChunks() * kWordsPerTask;
    const int64_t end = Min(d + kWordsPerTask, depth());
    typename Words::Number* tile = to + (lane * depth() + d * TileLanes(lane)) * Words::kNumbers;
    const auto pack = rows_are_lanes ? PackRowsAsLanes<Words> : PackRowsAsDepth<Words>;
    pack(rows, num_columns, lane, TileLanes(lane), d, end, tile);
  }

 private:
  int64_t NumChunks() const { return CeilDiv(depth(), kWordsPerTask); }
};

}  // namespace
}  // namespace citi
