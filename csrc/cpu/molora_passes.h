// The passes of MOLoRA over blocks of tokens of big matrices, in terms of sixteen lanes; compiled
// once for each variant.
//
// `Shrink` dots the rows of a matrix with a few others, `Expand` adds to it in place. Every sum has
// one order, whatever the threads and the strides.
#pragma once

#include "cpu/molora.h"
#include "cpu/molora_panels.h"
#include "whole_numbers.h"

namespace citi {
namespace {

// Tokens that pass through the rank space together: whole tiles.
#if defined(CITI_AVX2)
constexpr int64_t kMoloraTokens = 40;
#else
constexpr int64_t kMoloraTokens = 32;
#endif
static_assert(kMoloraTokens % kTileRows == 0 && kMoloraTokens <= kMostMoloraTokens);
// Whether memory is read along a few rows, which hardware follows, rather than down the columns of
// a tile, where rows a power of two apart push each other out of the caches. With AVX512 only the
// latter has been measured.
#if defined(CITI_AVX512)
constexpr bool kReadsAlongRows = false;
#else
constexpr bool kReadsAlongRows = true;
#endif
// Words of a token that Shrink takes at once, and how far one token's are from the next one's.
constexpr int64_t kShrinkWords = 96;
constexpr int64_t kShrinkStride = kShrinkWords + 16;

struct TokenBlock {
  int64_t begin;
  int64_t num_tokens;
};

// What is changed in place comes as a matrix as well.
template <class Element>
inline Element* RowOf(const Matrix& matrix, int64_t row) {
  return static_cast<Element*>(const_cast<void*>(matrix.data)) + row * matrix.row_stride;
}

inline void Prefetch(const void* from) {
#if defined(__GNUC__)
  // into L2; no address faults
  __builtin_prefetch(from, 0, 2);
#else
  static_cast<void>(from);
#endif
}

// Asks for rows [begin, end) of a few columns ahead of their use: hardware does not follow so many
// rows at once.
template <class Element>
inline void PrefetchRows(const Matrix& matrix, int64_t begin, int64_t end, int64_t column,
                         int64_t num_columns) {
#if defined(__GNUC__)
  constexpr int64_t kLine = 64;
  if (matrix.column_stride != 1) return;
  for (int64_t i = begin; i < end; ++i) {
    const char* row = reinterpret_cast<const char*>(RowOf<Element>(matrix, i) + column);
    const int64_t num_bytes = num_columns * static_cast<int64_t>(sizeof(Element));
    for (int64_t at = 0; at < num_bytes; at += kLine) __builtin_prefetch(row + at);
    __builtin_prefetch(row + num_bytes - 1);
  }
#endif
}

// take(words, d, depth): words [d, d + depth) of the block's rows, kShrinkStride words a token.
template <class Words, class Take>
void ReadInWords(const Matrix& matrix, const TokenBlock& block, int64_t num_columns,
                 const Take& take) {
  constexpr int64_t n = Words::kNumbers;
  alignas(64) typename Words::Number words[kMoloraTokens * kShrinkStride * n];
  const int64_t num_words = WordsOf<Words>(num_columns);
  for (int64_t d = 0; d < num_words; d += kShrinkWords) {
    const int64_t depth = Min(kShrinkWords, num_words - d);
    const int64_t width = Min(depth * n, num_columns - d * n);
    for (int64_t t = 0; t < block.num_tokens; ++t) {
      typename Words::Number* to = words + t * kShrinkStride * n;
      CopyRow<Words>(AllRowsOf(matrix), block.begin + t, d * n, width, to, 1);
      Fill(to + width, 1, depth * n - width);
    }
    const int64_t next = (d + kShrinkWords) * n;
    if (next < num_columns) {
      PrefetchRows<typename Words::Element>(matrix, block.begin, block.begin + block.num_tokens,
                                            next, Min(kShrinkWords * n, num_columns - next));
    }
    take(words, d, depth);
  }
}

// sums[t, lane] += the part of a dot product that `depth` words of each token give.
template <class Words>
void AddDots(const typename Words::Number* words, int64_t num_tokens, const Panel<Words>& panel,
             int64_t d, int64_t depth, float* sums) {
  constexpr int64_t n = Words::kNumbers;
  const int64_t num_lanes = panel.num_lanes();
  for (int64_t lane = 0; lane < num_lanes; lane += kTileLanes) {
    const int64_t tile_lanes = panel.TileLanes(lane);
    const typename Words::Number* right = panel.Tile(lane) + d * tile_lanes * n;
    for (int64_t t = 0; t < num_tokens; t += kTileRows) {
      MultiplyTile<Words, kShrinkStride>(
          Min(kTileRows, num_tokens - t), tile_lanes / kLanes,
          TileOperands<Words>{words + t * kShrinkStride * n, 1, right, tile_lanes, depth},
          AddToSums{sums + t * num_lanes + lane, num_lanes});
    }
  }
}

// sums[t, lane] = <row t of the block, lane of the panel>; (num_tokens, lanes of the panel)
template <class Words>
void Shrink(const Matrix& matrix, const TokenBlock& block, const Panel<Words>& panel,
            int64_t num_columns, float* sums) {
  Fill(sums, 1, block.num_tokens * panel.num_lanes());
  ReadInWords<Words>(matrix, block, num_columns,
                     [&](const typename Words::Number* words, int64_t d, int64_t depth) {
                       AddDots(words, block.num_tokens, panel, d, depth, sums);
                     });
}

// matrix[t] += sum of left[d, t] * panel[d]; left is (depth, kMoloraTokens)
template <class Words>
void Expand(const typename Words::Number* left, const Panel<Words>& panel, const Matrix& matrix,
            const TokenBlock& block, int64_t num_columns, bool is_added) {
  using X = typename Words::Element;
  const auto add = [&](int64_t t, int64_t lane) {
    const int64_t tile_lanes = panel.TileLanes(lane);
    MultiplyTile<Words, 1>(Min(kTileRows, block.num_tokens - t), tile_lanes / kLanes,
                           TileOperands<Words>{left + t * Words::kNumbers, kMoloraTokens,
                                               panel.Tile(lane), tile_lanes, panel.depth()},
                           AddToMatrix<X>{RowOf<X>(matrix, block.begin + t) + lane,
                                          matrix.row_stride, num_columns - lane, is_added});
  };
  if (kReadsAlongRows) {
    for (int64_t t = 0; t < block.num_tokens; t += kTileRows) {
      for (int64_t lane = 0; lane < num_columns; lane += kTileLanes) add(t, lane);
    }
    return;
  }
  for (int64_t lane = 0; lane < num_columns; lane += kTileLanes) {
    const int64_t next = lane + panel.TileLanes(lane);
    const int64_t num_next = Min(kTileLanes, num_columns - next);
    for (int64_t t = 0; t < block.num_tokens; t += kTileRows) {
      if (num_next > 0) {
        PrefetchRows<X>(matrix, block.begin + t, block.begin + Min(t + kTileRows, block.num_tokens),
                        next, num_next);
      }
      add(t, lane);
    }
  }
}

}  // namespace
}  // namespace citi
