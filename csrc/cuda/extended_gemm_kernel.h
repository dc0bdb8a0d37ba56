// Device code of the extended GEMM on Hopper. Also compiled as plain C++ by a test, which runs the
// threads of a cluster as threads of the host on a model of the instructions in hopper.h.
//
// A block: warp group 0 loads tiles into a ring of stages, runs ahead over units of the output and
// so hides the stores; two consumers multiply 64 rows each, with one batch of products under way
// while the next is issued, then add the bias, round and store by TMA.
#pragma once

#include <cstdint>

#include "cuda/extended_gemm_plan.h"
#include "dtype.h"

namespace citi::gemm {

struct Maps {
  hopper::TensorMap left[2];   // base, extension
  hopper::TensorMap right[2];  // base, extension
  hopper::TensorMap out;
};

// Which block of its cluster this is, and where its tiles begin.
template <class Tiles>
struct Position {
  uint32_t shared;
  uint32_t rank;
  uint32_t first_unit;
  uint32_t num_clusters;

  __device__ static Position OfBlock() {
    return {(hopper::SharedBase() + kAtomBytes - 1) / kAtomBytes * kAtomBytes,
            hopper::RankInCluster<Tiles::kCluster>(), hopper::BlockIndex() / Tiles::kCluster,
            hopper::NumBlocks() / Tiles::kCluster};
  }
  __device__ int32_t Row(Place place) const {
    return static_cast<int32_t>((place.row * Tiles::kCluster + rank) * kTileRows);
  }
  __device__ static int32_t Column(Place place) {
    return static_cast<int32_t>(place.column * Tiles::kWidth);
  }
};

template <class Tiles>
__device__ inline void InitBarriers(uint32_t shared) {
  for (int stage = 0; stage < Tiles::kStages; ++stage) {
    hopper::InitBarrier(shared + Tiles::Full(stage), Tiles::kFullArrivals);
    hopper::InitBarrier(shared + Tiles::Empty(stage), Tiles::kEmptyArrivals);
  }
  hopper::FenceInit();
}

// This block's share of the right operand, to all blocks of the cluster.
template <class Tiles, bool kIsTransposed>
__device__ inline void LoadRight(const hopper::TensorMap& map, uint32_t to, uint32_t barrier,
                                 int32_t depth, int32_t column, uint32_t rank, uint64_t policy) {
  constexpr int kBoxes = kIsTransposed ? kShareColumns / kBoxColumns : 1;
  constexpr int kBoxBytes = kShareColumns * kRowBytes / kBoxes;
  const int32_t first = column + static_cast<int32_t>(rank) * kShareColumns;
#pragma unroll
  for (int box = 0; box < kBoxes; ++box) {
    const uint32_t there = to + (rank * kBoxes + static_cast<uint32_t>(box)) * kBoxBytes;
    const int32_t inner = kIsTransposed ? first + box * kBoxColumns : depth;
    const int32_t outer = kIsTransposed ? depth : first;
    if constexpr (Tiles::kCluster == 1) {
      hopper::LoadBox(map, there, barrier, inner, outer, policy);
    } else {
      constexpr uint16_t kAll = (1u << Tiles::kCluster) - 1;
      hopper::LoadBoxToCluster(map, there, barrier, inner, outer, kAll, policy);
    }
  }
}

// One thread. A stage is filled when the consumers of the whole cluster have left it, for a share
// goes to all blocks; this block's barrier counts its own tile and every share.
template <class Tiles, bool kIsTransposed>
__device__ inline void Produce(const Launch& launch, const Maps& maps,
                               const Position<Tiles>& position) {
  const int32_t num_base_steps = launch.NumBaseSteps(), num_steps = launch.NumSteps();
  Ring<Tiles::kStages> ring;
  for (uint32_t unit = position.first_unit; unit < launch.NumUnits();
       unit += position.num_clusters) {
    const Place place = PlaceOfUnit(launch, unit);
    for (int32_t step = 0; step < num_steps; ++step) {
      const bool extends = step >= num_base_steps;
      const int32_t depth = (extends ? step - num_base_steps : step) * kTileDepth;
      const uint32_t full = position.shared + Tiles::Full(ring.stage);
      hopper::WaitBarrier(position.shared + Tiles::Empty(ring.stage), ring.phase ^ 1u);
      hopper::ArriveAndExpect(full, Tiles::kStageBytes);
      hopper::LoadBox(maps.left[extends], position.shared + Tiles::Left(ring.stage), full, depth,
                      position.Row(place));
      LoadRight<Tiles, kIsTransposed>(maps.right[extends],
                                      position.shared + Tiles::Right(ring.stage), full, depth,
                                      position.Column(place), position.rank, launch.right_policy);
      ring.Advance();
    }
  }
}

// A warp has read the stage: every block's producer is told, one by each lane.
template <class Tiles>
__device__ inline void Release(uint32_t shared, int stage, uint32_t lane) {
  if (lane < Tiles::kCluster) hopper::Arrive<Tiles::kCluster>(shared + Tiles::Empty(stage), lane);
}

// The products of a step; those of the step before are complete, of this one where it is not full.
template <DType kDType, bool kIsTransposed, int kSize>
__device__ inline void MultiplyStep(uint64_t left, uint64_t right, int32_t num_mmas,
                                    float (&acc)[kSize]) {
  constexpr uint64_t kLeftAdvance = DescriptorAdvance(false);
  constexpr uint64_t kRightAdvance = DescriptorAdvance(kIsTransposed);
  hopper::FenceAccumulators(acc);
  if (num_mmas == kMmasPerStep) {
    hopper::FenceProducts();
#pragma unroll
    for (int k = 0; k < kMmasPerStep; ++k) {
      hopper::Multiply<kDType, kIsTransposed>(acc, left + static_cast<uint64_t>(k) * kLeftAdvance,
                                              right + static_cast<uint64_t>(k) * kRightAdvance);
    }
    hopper::CommitProducts();
    hopper::WaitProducts<1>();
  } else {
#pragma unroll 1
    for (int32_t k = 0; k < num_mmas; ++k) {
      hopper::FenceProducts();
      hopper::Multiply<kDType, kIsTransposed>(acc, left, right);
      hopper::CommitProducts();
      left += kLeftAdvance, right += kRightAdvance;
    }
    hopper::WaitProducts<0>();
  }
}

// acc = the products of all steps of a unit.
template <class Tiles, DType kDType, bool kIsTransposed>
__device__ inline void MultiplyUnit(const Launch& launch, uint32_t shared, uint32_t consumer,
                                    uint32_t lane, Ring<Tiles::kStages>* ring,
                                    float (&acc)[Tiles::kWidth / 2]) {
  const int32_t num_steps = launch.NumSteps();
#pragma unroll
  for (int i = 0; i < Tiles::kWidth / 2; ++i) acc[i] = 0.0f;
  int last = 0;
  for (int32_t step = 0; step < num_steps; ++step) {
    const uint64_t left =
        DepthMajorDescriptor(shared + Tiles::Left(ring->stage) + consumer * kMmaRows * kRowBytes);
    const uint32_t right_at = shared + Tiles::Right(ring->stage);
    const uint64_t right =
        kIsTransposed ? ColumnMajorDescriptor(right_at) : DepthMajorDescriptor(right_at);
    hopper::WaitBarrier(shared + Tiles::Full(ring->stage), ring->phase);
    MultiplyStep<kDType, kIsTransposed>(left, right, launch.NumMmas(step), acc);
    if (step > 0) Release<Tiles>(shared, last, lane);
    last = ring->stage;
    ring->Advance();
  }
  hopper::WaitProducts<0>();
  hopper::FenceAccumulators(acc);
  Release<Tiles>(shared, last, lane);
}

// The bias of the two columns from `column` on; columns beyond the last have none.
__device__ inline uint32_t LoadBias(const Launch& launch, int32_t column) {
  if (launch.bias == nullptr || column >= launch.num_columns) return 0;
  if (column + 1 == launch.num_columns) return launch.bias[column];
  return *reinterpret_cast<const uint32_t*>(launch.bias + column);
}

template <DType kDType>
__device__ inline float HalfOf(uint32_t pair, bool is_high) {
  const auto bits = static_cast<uint16_t>(is_high ? pair >> 16 : pair & 0xffffu);
  if constexpr (kDType == DType::kBFloat16) {
    return ToFloat(BFloat16{bits});
  } else {
    return ToFloat(Float16{bits});
  }
}

// 16 columns of the accumulators, rounded once, into a swizzled box of 64 x 64.
template <DType kDType, int kSize>
__device__ inline void StoreSixteen(const float (&acc)[kSize], const uint32_t (&bias)[kSize / 4],
                                    int number, uint32_t row_address) {
  uint32_t values[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int i = number * 8 + j * 2;
    const uint32_t pair = bias[i / 4];
    values[j] = hopper::Pack<kDType>(acc[i] + HalfOf<kDType>(pair, false),
                                     acc[i + 1] + HalfOf<kDType>(pair, true));
  }
  hopper::StoreMatrices(row_address, values);
}

// 64 columns at a time through two buffers. One thread of the consumer issues the stores.
template <class Tiles, DType kDType>
__device__ inline void StoreUnit(const Launch& launch, const hopper::TensorMap& map,
                                 uint32_t shared, uint32_t consumer, int thread, int32_t row,
                                 int32_t column, const float (&acc)[Tiles::kWidth / 2],
                                 const uint32_t (&bias)[Tiles::kWidth / 8]) {
  constexpr int kSixteens = kBoxColumns / 16;
#pragma unroll
  for (int part = 0; part < Tiles::kWidth / kBoxColumns; ++part) {
    const uint32_t buffer = shared + Tiles::Buffer(static_cast<int>(consumer), part % kNumBuffers);
    if (thread == 0) hopper::WaitStoresRead<kNumBuffers - 1>();
    hopper::SyncThreads<kGroupThreads>(1 + consumer);
#pragma unroll
    for (int i = 0; i < kSixteens; ++i) {
      StoreSixteen<kDType>(acc, bias, part * kSixteens + i, buffer + StoredOffset(thread, i));
    }
    hopper::FenceSharedWrites();
    hopper::SyncThreads<kGroupThreads>(1 + consumer);
    if (thread == 0) {
      const int32_t first = column + part * kBoxColumns;
      if (row < launch.num_rows && first < launch.num_columns) {
        hopper::StoreBox(map, buffer, first, row, launch.out_policy);
      }
      // Empty groups too: the wait above counts one for every part.
      hopper::CommitStores();
    }
  }
}

template <class Tiles, DType kDType, bool kIsTransposed>
__device__ inline void Consume(const Launch& launch, const Maps& maps,
                               const Position<Tiles>& position, uint32_t consumer) {
  const int thread = static_cast<int>(hopper::ThreadIndex()) % kGroupThreads;
  const uint32_t lane = static_cast<uint32_t>(thread) % kWarp;
  float acc[Tiles::kWidth / 2];
  uint32_t bias[Tiles::kWidth / 8];
  Ring<Tiles::kStages> ring;
  for (uint32_t unit = position.first_unit; unit < launch.NumUnits();
       unit += position.num_clusters) {
    const Place place = PlaceOfUnit(launch, unit);
    const int32_t column = position.Column(place);
    // Loaded here, so that they arrive behind the products.
#pragma unroll
    for (int i = 0; i < Tiles::kWidth / 8; ++i) {
      bias[i] = LoadBias(launch, column + FragmentColumn(thread, 4 * i));
    }
    MultiplyUnit<Tiles, kDType, kIsTransposed>(launch, position.shared, consumer, lane, &ring, acc);
    StoreUnit<Tiles, kDType>(launch, maps.out, position.shared, consumer, thread,
                             position.Row(place) + static_cast<int32_t>(consumer) * kMmaRows,
                             column, acc, bias);
  }
  if (thread == 0) hopper::WaitStoresRead<0>();
}

// The kernel. Grid: at most as many blocks as multiprocessors, whole clusters.
template <class Tiles, DType kDType, bool kIsTransposed>
__device__ inline void RunExtendedGemm(const Launch& launch, const Maps& maps) {
  const Position<Tiles> position = Position<Tiles>::OfBlock();
  const uint32_t warp = hopper::Uniform(hopper::ThreadIndex() / kWarp);
  const uint32_t group = warp / (kGroupThreads / kWarp);
  if (hopper::ThreadIndex() == 0) InitBarriers<Tiles>(position.shared);
  hopper::SyncCluster<Tiles::kCluster>();
  if (group == 0) {
    hopper::ShrinkRegisters<kProducerRegisters>();
    if (warp == 0 && hopper::ElectLane()) Produce<Tiles, kIsTransposed>(launch, maps, position);
    hopper::SyncWarp();
  } else {
    hopper::GrowRegisters<kConsumerRegisters>();
    Consume<Tiles, kDType, kIsTransposed>(launch, maps, position, group - 1);
    hopper::SyncWarp();
  }
  // No block ends while another may still arrive at its barriers.
  hopper::SyncCluster<Tiles::kCluster>();
}

}  // namespace citi::gemm
