// The sums of MOLoRA over all tokens, in terms of sixteen lanes; compiled once for each variant.
//
// `SumOverTokens` contracts a block of columns of a big matrix with a few columns, chunk by chunk
// of tokens, each packed into panels. Every sum has one order, whatever the threads and strides.
#pragma once

#include "cpu/molora_passes.h"

namespace citi {
namespace {

constexpr int64_t kSumColumns = 144;
constexpr int64_t kSumRows = 48;
constexpr int64_t kSumWords = 64;

// The few columns, rows of the sums, as words (T, stride).
template <class Words>
struct SummedRows {
  const typename Words::Number* words;
  int64_t stride;
  int64_t num_rows;
};

// sums[m, first + i] += the part that words [d, d + depth), as lanes i of a panel, give
template <class Words>
inline void AddChunk(const SummedRows<Words>& left, int64_t d, int64_t depth,
                     const typename Words::Number* panel, int64_t num_lanes, int64_t first,
                     float (*sums)[kSumColumns]) {
  constexpr int64_t n = Words::kNumbers;
  for (int64_t m = 0; m < left.num_rows; m += kTileRows) {
    MultiplyTile<Words, 1>(
        Min(kTileRows, left.num_rows - m), num_lanes / kLanes,
        TileOperands<Words>{left.words + (d * left.stride + m) * n, left.stride, panel, num_lanes,
                            depth},
        AddToSums{sums[m] + first, kSumColumns});
  }
}

// Columns [column, end) of tokens as panels of a chunk's words, one behind the other.
template <class Words>
struct ChunkPacker {
  using Number = typename Words::Number;
  static constexpr int64_t kPanel = kSumWords * kTileLanes * Words::kNumbers;
  static constexpr int64_t kSize = kSumColumns / kTileLanes * kPanel;

  const Rows& tokens;
  int64_t num_columns;
  int64_t column;
  int64_t end;

  int64_t NumPanels() const { return CeilDiv(end - column, kTileLanes); }
  int64_t NumLanes(int64_t panel) const {
    return RoundUp(Min(kTileLanes, end - column - panel * kTileLanes), kLanes);
  }

  // Words [d, d_end) of the chunk that begins at word `first`; row by row, through all panels.
  void Pack(int64_t first, int64_t d, int64_t d_end, Number* to) const {
    for (; d < d_end; ++d) {
      int64_t panel = 0;
      if constexpr (Words::kNumbers == 1) {
        tokens.With(d, [&](const auto* row, int64_t stride) {
          if (stride != 1) return;
          for (; (panel + 1) * kTileLanes <= end - column; ++panel) {
            Number* lanes = to + panel * kPanel + (d - first) * kTileLanes;
            const auto* from = row + column + panel * kTileLanes;
            for (int64_t i = 0; i < kTileLanes; ++i) lanes[i] = Words::Of(from[i]);
          }
        });
      }
      for (; panel < NumPanels(); ++panel) {
        const int64_t at = (d - first) * NumLanes(panel) * Words::kNumbers;
        PackRowsAsDepth<Words>(tokens, num_columns, column + panel * kTileLanes, NumLanes(panel), d,
                               d + 1, to + panel * kPanel + at);
      }
    }
  }

  void Ask(int64_t d, int64_t d_end) const {
    constexpr int64_t n = Words::kNumbers;
    PrefetchRows<typename Words::Element>(tokens.first, Min(d * n, tokens.num_rows),
                                          Min(d_end * n, tokens.num_rows), column, end - column);
  }
};

// The next chunk's rows are asked for and packed part by part between this one's products.
template <class Words, class Change>
void SumAlongRows(const SummedRows<Words>& left, const ChunkPacker<Words>& packer,
                  const Change& change, float (*sums)[kSumColumns]) {
  using Packer = ChunkPacker<Words>;
  alignas(64) typename Words::Number chunks[2][Packer::kSize];
  const int64_t num_words = WordsOf<Words>(packer.tokens.num_rows);
  const int64_t num_panels = packer.NumPanels();
  packer.Pack(0, 0, Min(kSumWords, num_words), chunks[0]);
  for (int64_t d = 0, side = 0; d < num_words; d += kSumWords, side = 1 - side) {
    const int64_t depth = Min(kSumWords, num_words - d), next = d + depth;
    const int64_t num_next = Min(kSumWords, num_words - next);
    for (int64_t panel = 0; panel < num_panels; ++panel) {
      const int64_t part = next + num_next * panel / num_panels;
      const int64_t part_end = next + num_next * (panel + 1) / num_panels;
      packer.Ask(part, part_end);
      const int64_t first = panel * kTileLanes, num_lanes = packer.NumLanes(panel);
      typename Words::Number* words = chunks[side] + panel * Packer::kPanel;
      change(d, depth, packer.column + first, num_lanes, words);
      AddChunk(left, d, depth, words, num_lanes, first, sums);
      packer.Pack(next, part, part_end, chunks[1 - side]);
    }
  }
}

// Panel by panel; the next one's rows are asked for before this one's products.
template <class Words, class Change>
void SumDownColumns(const SummedRows<Words>& left, const ChunkPacker<Words>& packer,
                    const Change& change, float (*sums)[kSumColumns]) {
  constexpr int64_t n = Words::kNumbers;
  alignas(64) typename Words::Number words[kSumWords * kTileLanes * n];
  const Rows& tokens = packer.tokens;
  const int64_t column = packer.column, end = packer.end;
  const int64_t num_words = WordsOf<Words>(tokens.num_rows);
  for (int64_t d = 0; d < num_words; d += kSumWords) {
    const int64_t depth = Min(kSumWords, num_words - d);
    for (int64_t lane = column; lane < end; lane += kTileLanes) {
      const int64_t num_lanes = RoundUp(Min(kTileLanes, end - lane), kLanes);
      PackRowsAsDepth<Words>(tokens, packer.num_columns, lane, num_lanes, d, d + depth, words);
      change(d, depth, lane, num_lanes, words);
      const bool is_last = lane + kTileLanes >= end;
      const int64_t next_d = is_last ? d + kSumWords : d;
      const int64_t next_lane = is_last ? column : lane + kTileLanes;
      PrefetchRows<typename Words::Element>(tokens.first, Min(next_d * n, tokens.num_rows),
                                            Min((next_d + kSumWords) * n, tokens.num_rows),
                                            next_lane, Min(kTileLanes, end - next_lane));
      AddChunk(left, d, depth, words, num_lanes, lane - column, sums);
    }
  }
}

// sums[m, j] = sum of left[t, m] * tokens[t, column + j] over all t
// change(word d, depth, column, lanes, panel) has its way with a panel of tokens first.
template <class Words, class Change>
void SumOverTokens(const SummedRows<Words>& left, const Rows& tokens, int64_t num_columns,
                   int64_t column, const Change& change, float (*sums)[kSumColumns]) {
  for (int64_t m = 0; m < left.num_rows; ++m) Fill(sums[m], 1, kSumColumns);
  const ChunkPacker<Words> packer{tokens, num_columns, column,
                                  Min(column + kSumColumns, num_columns)};
  if constexpr (kReadsAlongRows) {
    SumAlongRows(left, packer, change, sums);
  } else {
    SumDownColumns(left, packer, change, sums);
  }
}

}  // namespace
}  // namespace citi
