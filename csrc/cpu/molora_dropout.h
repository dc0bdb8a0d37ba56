// The passes of MOLoRA over x and dx with dropout: the ranks see kept inputs alone, the gates all.
//
// What is dropped becomes 0 in words that lie in cache; 1 / (1 - p) is applied in the rank space.
#pragma once

#include <cstring>

#include "cpu/molora_passes.h"
#include "dropout.h"

namespace citi {
namespace {

// Of sixteen words those numbers that are kept; is_kept(i, part) says which.
template <class Words, class IsKept>
inline void KeepInWords(int64_t num_words, const IsKept& is_kept, typename Words::Number* numbers) {
  static_assert(Words::kNumbers == 1 || Words::kNumbers == 2);
  uint32_t words[kLanes] = {};
  const size_t num_bytes = static_cast<size_t>(num_words) * sizeof(uint32_t);
  std::memcpy(words, numbers, num_bytes);
  for (int64_t i = 0; i < kLanes; ++i) {
    if constexpr (Words::kNumbers == 1) {
      words[i] = is_kept(i, 0) ? words[i] : 0u;
    } else {
      words[i] = KeptOf(words[i], is_kept(i, 0), is_kept(i, 1));
    }
  }
  std::memcpy(numbers, words, num_bytes);
}

// Words [d, d + depth) of one token.
template <class Words>
void DropInputs(const Dropout& dropout, int64_t token, int64_t d, int64_t depth,
                typename Words::Number* numbers) {
  constexpr int64_t n = Words::kNumbers;
  const uint32_t hash = HashOfToken(dropout, token);
  for (int64_t i = 0; i < depth; i += kLanes) {
    const int64_t k = (d + i) * n;
    KeepInWords<Words>(
        Min(kLanes, depth - i),
        [=](int64_t lane, int64_t part) { return Keeps(dropout, hash, k + lane * n + part); },
        numbers + i * n);
  }
}

// Words [d, d + depth) of tokens, each of sixteen lanes or more from an input on.
template <class Words>
void DropInputsOfPanel(const Dropout& dropout, int64_t d, int64_t depth, int64_t input,
                       int64_t num_lanes, typename Words::Number* panel) {
  constexpr int64_t n = Words::kNumbers;
  for (int64_t i = 0; i < depth; ++i) {
    uint32_t hashes[n];
    for (int64_t part = 0; part < n; ++part) {
      hashes[part] = HashOfToken(dropout, (d + i) * n + part);
    }
    for (int64_t lane = 0; lane < num_lanes; lane += kLanes) {
      KeepInWords<Words>(
          kLanes,
          [&](int64_t k, int64_t part) { return Keeps(dropout, hashes[part], input + lane + k); },
          panel + (i * num_lanes + lane) * n);
    }
  }
}

// Shrink, of the kept inputs by `ranks` and of all by `gates`.
template <class Words>
void ShrinkKept(const Matrix& x, const TokenBlock& block, const Panel<Words>& ranks,
                const Panel<Words>& gates, int64_t num_in, const Dropout& dropout,
                float* sums_of_ranks, float* sums_of_gates) {
  Fill(sums_of_ranks, 1, block.num_tokens * ranks.num_lanes());
  Fill(sums_of_gates, 1, block.num_tokens * gates.num_lanes());
  ReadInWords<Words>(
      x, block, num_in, [&](typename Words::Number* words, int64_t d, int64_t depth) {
        AddDots(words, block.num_tokens, gates, d, depth, sums_of_gates);
        for (int64_t t = 0; t < block.num_tokens; ++t) {
          DropInputs<Words>(dropout, block.begin + t, d, depth,
                            words + t * kShrinkStride * Words::kNumbers);
        }
        AddDots(words, block.num_tokens, ranks, d, depth, sums_of_ranks);
      });
}

// A left operand of Expand with its panel.
template <class Words>
struct Factor {
  const typename Words::Number* left;  // (depth, kMoloraTokens)
  const Panel<Words>* panel;
};

// dx[t] += the kept of ranks' product + gates' product, with one rounding
template <class Words>
void ExpandKept(const Factor<Words>& ranks, const Factor<Words>& gates, const Matrix& dx,
                const TokenBlock& block, int64_t num_in, bool is_added, const Dropout& dropout) {
  using X = typename Words::Element;
  alignas(64) float sums[kTileRows * kTileLanes];
  for (int64_t lane = 0; lane < num_in; lane += kTileLanes) {
    const int64_t tile_lanes = ranks.panel->TileLanes(lane);
    for (int64_t t = 0; t < block.num_tokens; t += kTileRows) {
      const int64_t num_rows = Min(kTileRows, block.num_tokens - t);
      const auto add = [&](const Factor<Words>& factor) {
        MultiplyTile<Words, 1>(num_rows, tile_lanes / kLanes,
                               TileOperands<Words>{factor.left + t * Words::kNumbers, kMoloraTokens,
                                                   factor.panel->Tile(lane), tile_lanes,
                                                   factor.panel->depth()},
                               AddToSums{sums, kTileLanes});
      };
      Fill(sums, 1, kTileRows * kTileLanes);
      add(ranks);
      for (int64_t m = 0; m < num_rows; ++m) {
        const uint32_t hash = HashOfToken(dropout, block.begin + t + m);
        for (int64_t i = 0; i < tile_lanes; i += kLanes) {
          KeepInWords<Singles<float>>(
              kLanes, [=](int64_t k, int64_t) { return Keeps(dropout, hash, lane + i + k); },
              sums + m * kTileLanes + i);
        }
      }
      add(gates);
      for (int64_t m = 0; m < num_rows; ++m) {
        X* row = RowOf<X>(dx, block.begin + t + m) + lane;
        for (int64_t i = 0; i < tile_lanes; i += kLanes) {
          const Floats tile[1][1] = {{Floats::Load(sums + m * kTileLanes + i)}};
          AddToMatrix<X>{row + i, 0, num_in - lane - i, is_added}.Take(tile);
        }
      }
    }
  }
}

}  // namespace
}  // namespace citi
