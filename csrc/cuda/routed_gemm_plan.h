// What the routed GEMM on Hopper is laid out by, on top of extended_gemm_plan.h: pure arithmetic.
//
// Units of the first tile of columns come before all others. In these the left operand is also
// multiplied by a narrow right operand; its products become u (or dz) of these rows, which every
// unit of the rows reads at its end. So nobody waits for a unit that is not under way.
#pragma once

#include "cuda/extended_gemm_plan.h"
#include "routed_gemm_arguments.h"

namespace citi::gemm {

// Columns of the narrow operand, and bytes of a tile of it.
constexpr int kMaxNarrow = 64;
constexpr int kNarrowSlotBytes = kMaxNarrow * kRowBytes;
// A stack of up to as many rows, such as 4 experts of rank 8 and their gates.
constexpr int kSmallNarrow = 40;
// As many columns of b.
constexpr int kSmallTransposedNarrow = 32;

// Together what a multiprocessor's registers are for at the launch, 168 a thread.
constexpr int kRoutedProducerRegisters = 40;
constexpr int kRoutedConsumerRegisters = 232;

// Rows that one consumer finishes are one arrival of two at the count of a tile of rows.
constexpr uint32_t kArrivalsOfRows = kConsumers;

// A narrow tile lies in the place of a store buffer, which is free in a unit's first part.
template <int kWidth, int kCluster, int kStages>
struct RoutedTiles : Tiles<kWidth, kCluster, kStages> {
  using Base = Tiles<kWidth, kCluster, kStages>;
  static constexpr int kNumSlots =
      kStages > kConsumers* kNumBuffers ? kStages : kConsumers * kNumBuffers;
  static constexpr int kBarriersAt = Base::kBuffersAt + kNumSlots * kNarrowSlotBytes;
  static constexpr int kUsedBytes = kBarriersAt + (2 * kStages + 1) * kBarrierBytes;
  static constexpr int kSharedBytes = kUsedBytes + kAtomBytes;
  // Of one thread of each consumer, when its stores have left the buffers.
  static constexpr int kStoredArrivals = kConsumers;

  CITI_HOST_DEVICE static constexpr uint32_t Narrow(int stage) {
    return static_cast<uint32_t>(Base::kBuffersAt + stage * kNarrowSlotBytes);
  }
  CITI_HOST_DEVICE static constexpr uint32_t Full(int stage) {
    return static_cast<uint32_t>(kBarriersAt + stage * kBarrierBytes);
  }
  CITI_HOST_DEVICE static constexpr uint32_t Empty(int stage) { return Full(kStages + stage); }
  CITI_HOST_DEVICE static constexpr uint32_t Stored() { return Full(2 * kStages); }

  static_assert(kNarrowSlotBytes == kBufferBytes, "a tile in the place of a buffer");
  static_assert(kNumBuffers * kBufferBytes == kMmaRows * kMaxNarrow * 4, "sums in fp32");
  static_assert(kSharedBytes <= kMaxSharedBytes, "shared memory of sm_90");
};

using WideRoutedTiles = RoutedTiles<256, 2, 4>;
using NarrowRoutedTiles = RoutedTiles<128, 1, 5>;

// What is rank-sized, as the kernel takes it.
struct RankSpace {
  void* h;             // (T, R)
  void* left;          // u (T, P) or dz (T, Z)
  float* probs;        // (T, G)
  const float* dgate;  // (T, G); null: 0
  uint32_t* counts;
  int num_ranks, padded_ranks, num_gates, padded_gates;
  int expert_rank;
  float scaling;
};

inline RankSpace RankSpaceOf(const RoutedGemm& routed) {
  const RankShape& shape = routed.shape;
  return {routed.h.data,
          const_cast<void*>(routed.gemm.more_left.data),
          static_cast<float*>(routed.probs.data),
          static_cast<const float*>(routed.dgate.data),
          reinterpret_cast<uint32_t*>(const_cast<int32_t*>(routed.counts.data)),
          static_cast<int>(shape.num_ranks()),
          static_cast<int>(shape.padded_ranks()),
          static_cast<int>(shape.num_gates()),
          static_cast<int>(shape.padded_gates()),
          static_cast<int>(shape.expert_rank),
          routed.scaling};
}

CITI_HOST_DEVICE constexpr Place PlaceOfRoutedUnit(const Launch& launch, uint32_t unit) {
  if (unit < launch.num_unit_rows) return {unit, 0};
  Launch others = launch;
  --others.num_unit_columns;
  const Place place = PlaceOfUnit(others, unit - launch.num_unit_rows);
  return {place.row, place.column + 1};
}

// Where a sum of a row of 64 is: neither a fragment nor a column of a warp's rows meets in a bank
// more than twice.
CITI_HOST_DEVICE constexpr int SumSwizzle(int row) { return row % 4 * 8 | row / 4 % 4 * 2; }

// The narrow operand, in boxes as those of the right operand.
inline MapShape NarrowShapeOf(const RoutedGemm& routed, int narrow) {
  if (routed.gemm.is_input_gradient) {
    return ShapeOf(routed.narrow, routed.gemm.depth, routed.shape.num_ranks(), kTileDepth);
  }
  return ShapeOf(routed.narrow, routed.shape.num_rows(), routed.gemm.depth, narrow);
}

// Columns of a box of the transposed operand are always 64.
inline bool TakesSmallNarrow(const RoutedGemm& routed) {
  return !routed.gemm.is_input_gradient && routed.shape.num_rows() <= kSmallNarrow;
}

inline bool TakesSmallTransposedNarrow(const RoutedGemm& routed) {
  return routed.gemm.is_input_gradient && routed.fits_narrow &&
         routed.shape.num_ranks() <= kSmallTransposedNarrow;
}

// As for the extended GEMM, with the tiles that are here.
inline bool TakesWideRoutedTiles(const RoutedGemm& routed, int num_multiprocessors) {
  return TakesWideTiles(routed.gemm, num_multiprocessors);
}

}  // namespace citi::gemm
