// Device code of the routed GEMM on Hopper: the extended GEMM, whose first units also make the
// rank-sized operand of the extension. Also compiled as plain C++ by a test; see
// extended_gemm_kernel.h.
//
// A unit of the first columns: products with the narrow operand beside those with the wide one;
// the sums to shared memory; gates, h and u (or dz) of the rows to global memory; a count says so
// to all blocks. Every producer waits for the count before it loads the extension.
#pragma once

#include "cuda/extended_gemm_kernel.h"
#include "cuda/route_kernels.h"
#include "cuda/routed_gemm_plan.h"

namespace citi::gemm {

struct RoutedMaps {
  Maps maps;
  hopper::TensorMap narrow;
};

constexpr uint32_t kBarrierOfConsumers = 1 + kConsumers;

template <class Tiles>
__device__ inline uint32_t TileOfRows(const Position<Tiles>& position, Place place) {
  return place.row * Tiles::kCluster + position.rank;
}

// Of a cluster, the last block may have no rows: nobody counts for it, and it waits for none.
__device__ inline bool HasRows(const Launch& launch, uint32_t tile) {
  return static_cast<int64_t>(tile) * kTileRows < launch.num_rows;
}

// One step of a unit, and of the narrow operand where it is not null; this block's own.
template <class Tiles, bool kIsTransposed, int kNarrow>
__device__ inline void ProduceRoutedStep(const hopper::TensorMap& left,
                                         const hopper::TensorMap& right,
                                         const hopper::TensorMap* narrow,
                                         const Position<Tiles>& position,
                                         const Ring<Tiles::kStages>& ring, int32_t depth,
                                         Place place, uint64_t policy) {
  constexpr int kNarrowBytes = (kIsTransposed ? kTileDepth : kNarrow) * kRowBytes;
  const uint32_t full = position.shared + Tiles::Full(ring.stage);
  hopper::WaitBarrier(position.shared + Tiles::Empty(ring.stage), ring.phase ^ 1u);
  hopper::ArriveAndExpect(full, Tiles::kStageBytes + (narrow == nullptr ? 0 : kNarrowBytes));
  hopper::LoadBox(left, position.shared + Tiles::Left(ring.stage), full, depth,
                  position.Row(place));
  LoadRight<Tiles, kIsTransposed>(right, position.shared + Tiles::Right(ring.stage), full, depth,
                                  position.Column(place), position.rank, policy);
  if (narrow != nullptr) {
    hopper::LoadBox(*narrow, position.shared + Tiles::Narrow(ring.stage), full,
                    kIsTransposed ? 0 : depth, kIsTransposed ? depth : 0);
  }
}

// One thread; see Produce.
template <class Tiles, bool kIsTransposed, int kNarrow>
__device__ inline void ProduceRouted(const Launch& launch, const RoutedMaps& maps,
                                     const RankSpace& ranks, const Position<Tiles>& position) {
  const int32_t num_base_steps = launch.NumBaseSteps(), num_steps = launch.NumSteps();
  Ring<Tiles::kStages> ring;
  uint32_t stored_phase = 0;
  for (uint32_t unit = position.first_unit; unit < launch.NumUnits();
       unit += position.num_clusters) {
    const Place place = PlaceOfRoutedUnit(launch, unit);
    const hopper::TensorMap* narrow = place.column == 0 ? &maps.narrow : nullptr;
    if (narrow != nullptr && unit != position.first_unit) {
      // The buffers, where narrow tiles go, still hold the unit before, of the first columns too.
      hopper::WaitBarrier(position.shared + Tiles::Stored(), stored_phase);
      stored_phase ^= 1u;
    }
    for (int32_t step = 0; step < num_base_steps; ++step) {
      ProduceRoutedStep<Tiles, kIsTransposed, kNarrow>(maps.maps.left[0], maps.maps.right[0],
                                                       narrow, position, ring, step * kTileDepth,
                                                       place, launch.right_policy);
      ring.Advance();
    }
    const uint32_t tile = TileOfRows<Tiles>(position, place);
    if (HasRows(launch, tile)) {
      hopper::WaitForCount(ranks.counts + tile, kArrivalsOfRows);
      hopper::FenceProxies();
    }
    for (int32_t step = num_base_steps; step < num_steps; ++step) {
      ProduceRoutedStep<Tiles, kIsTransposed, kNarrow>(
          maps.maps.left[1], maps.maps.right[1], nullptr, position, ring,
          (step - num_base_steps) * kTileDepth, place, launch.right_policy);
      ring.Advance();
    }
  }
}

// MultiplyStep, with the products of the narrow operand beside the others.
template <DType kDType, bool kIsTransposed, int kSize, int kNarrowSize>
__device__ inline void MultiplyBoth(uint64_t left, uint64_t right, uint64_t narrow_right,
                                    int32_t num_mmas, float (&acc)[kSize],
                                    float (&narrow)[kNarrowSize]) {
  constexpr uint64_t kLeftAdvance = DescriptorAdvance(false);
  constexpr uint64_t kRightAdvance = DescriptorAdvance(kIsTransposed);
  hopper::FenceAccumulators(acc);
  hopper::FenceAccumulators(narrow);
  if (num_mmas == kMmasPerStep) {
    hopper::FenceProducts();
#pragma unroll
    for (int k = 0; k < kMmasPerStep; ++k) {
      const auto number = static_cast<uint64_t>(k);
      hopper::Multiply<kDType, kIsTransposed>(acc, left + number * kLeftAdvance,
                                              right + number * kRightAdvance);
      hopper::Multiply<kDType, kIsTransposed>(narrow, left + number * kLeftAdvance,
                                              narrow_right + number * kRightAdvance);
    }
    hopper::CommitProducts();
    hopper::WaitProducts<1>();
  } else {
#pragma unroll 1
    for (int32_t k = 0; k < num_mmas; ++k) {
      hopper::FenceProducts();
      hopper::Multiply<kDType, kIsTransposed>(acc, left, right);
      hopper::Multiply<kDType, kIsTransposed>(narrow, left, narrow_right);
      hopper::CommitProducts();
      left += kLeftAdvance, right += kRightAdvance, narrow_right += kRightAdvance;
    }
    hopper::WaitProducts<0>();
  }
}

template <bool kIsTransposed>
__device__ inline uint64_t RightDescriptor(uint32_t address) {
  return kIsTransposed ? ColumnMajorDescriptor(address) : DepthMajorDescriptor(address);
}

// acc, narrow = the products of all steps but the extension.
template <class Tiles, DType kDType, bool kIsTransposed, int kNarrow>
__device__ inline void MultiplyFirstSteps(const Launch& launch, uint32_t shared, uint32_t consumer,
                                          uint32_t lane, Ring<Tiles::kStages>* ring,
                                          float (&acc)[Tiles::kWidth / 2],
                                          float (&narrow)[kNarrow / 2]) {
  const int32_t num_steps = launch.NumBaseSteps();
#pragma unroll
  for (int i = 0; i < Tiles::kWidth / 2; ++i) acc[i] = 0.0f;
#pragma unroll
  for (int i = 0; i < kNarrow / 2; ++i) narrow[i] = 0.0f;
  int last = 0;
  for (int32_t step = 0; step < num_steps; ++step) {
    const uint64_t left =
        DepthMajorDescriptor(shared + Tiles::Left(ring->stage) + consumer * kMmaRows * kRowBytes);
    const uint64_t right = RightDescriptor<kIsTransposed>(shared + Tiles::Right(ring->stage));
    const uint64_t narrow_right =
        RightDescriptor<kIsTransposed>(shared + Tiles::Narrow(ring->stage));
    hopper::WaitBarrier(shared + Tiles::Full(ring->stage), ring->phase);
    MultiplyBoth<kDType, kIsTransposed>(left, right, narrow_right, launch.NumMmas(step), acc,
                                        narrow);
    if (step > 0) Release<Tiles>(shared, last, lane);
    last = ring->stage;
    ring->Advance();
  }
  hopper::WaitProducts<0>();
  hopper::FenceAccumulators(acc);
  hopper::FenceAccumulators(narrow);
  Release<Tiles>(shared, last, lane);
}

// acc += the products of the extension, which is one step here.
template <class Tiles, DType kDType, bool kIsTransposed>
__device__ inline void MultiplyExtension(const Launch& launch, uint32_t shared, uint32_t consumer,
                                         uint32_t lane, Ring<Tiles::kStages>* ring,
                                         float (&acc)[Tiles::kWidth / 2]) {
  const uint64_t left =
      DepthMajorDescriptor(shared + Tiles::Left(ring->stage) + consumer * kMmaRows * kRowBytes);
  const uint64_t right = RightDescriptor<kIsTransposed>(shared + Tiles::Right(ring->stage));
  hopper::WaitBarrier(shared + Tiles::Full(ring->stage), ring->phase);
  MultiplyStep<kDType, kIsTransposed>(left, right, launch.NumMmas(launch.NumBaseSteps()), acc);
  hopper::WaitProducts<0>();
  hopper::FenceAccumulators(acc);
  Release<Tiles>(shared, ring->stage, lane);
  ring->Advance();
}

// Sums of one row in shared memory, from a column on.
struct SumRow {
  float* sums;
  int swizzle;
  int first;

  __device__ float& operator[](int column) const { return sums[(first + column) ^ swizzle]; }
};

__device__ inline SumRow SumRowAt(uint32_t address, int row, int first = 0) {
  return {hopper::SharedFloats(address) + row * kMaxNarrow, SumSwizzle(row), first};
}

template <int kSize>
__device__ inline void StoreSums(const float (&narrow)[kSize], uint32_t address, int thread) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    SumRowAt(address, FragmentRow(thread, i))[FragmentColumn(thread, i)] = narrow[i];
  }
}

template <class Element>
__device__ inline uint4 AsWords(const Element (&elements)[kChunk]) {
  const auto pair = [&](int i) {
    return elements[i].bits | static_cast<uint32_t>(elements[i + 1].bits) << 16;
  };
  return {pair(0), pair(2), pair(4), pair(6)};
}

// Gates of a row from its logits, which they replace.
__device__ inline void GatesOfRow(const RankSpace& s, uint32_t sums, int row, int64_t token) {
  const SumRow logits = SumRowAt(sums, row, s.padded_ranks);
  RouteLaunch all_kept{};
  all_kept.num_gates = s.num_gates;
  Softmax(all_kept, logits);
  for (int g = 0; g < s.num_gates; ++g) s.probs[token * s.num_gates + g] = logits[g];
}

// Which expert a rank belongs to, from one on; a division for each would take longer than the rest.
struct ExpertOfRank {
  int expert, in_expert;

  __device__ ExpertOfRank(const RankSpace& s, int rank)
      : expert(rank / s.expert_rank), in_expert(rank - expert * s.expert_rank) {}
  __device__ void Advance(const RankSpace& s) {
    if (++in_expert < s.expert_rank) return;
    in_expert = 0;
    ++expert;
  }
};

// h and u of 8 ranks of a row; as Route has them.
template <class Element>
__device__ inline void ScaleChunk(const RankSpace& s, uint32_t sums, int row, int64_t token,
                                  int first) {
  const SumRow z = SumRowAt(sums, row);
  Element h[kChunk], u[kChunk];
  ExpertOfRank of(s, first);
#pragma unroll
  for (int j = 0; j < kChunk; ++j) {
    const int rank = first + j;
    h[j] = u[j] = Rounded<Element>(0.0f);
    if (rank < s.num_ranks) {
      h[j] = Rounded<Element>(z[rank]);
      const float gate = z[s.padded_ranks + 1 + of.expert];
      u[j] = Rounded<Element>(ToFloat(h[j]) * (s.scaling * gate));
    }
    of.Advance(s);
  }
  Element* to = static_cast<Element*>(s.h) + token * s.num_ranks + first;
  if (s.num_ranks == s.padded_ranks) {
    *reinterpret_cast<uint4*>(to) = AsWords(h);
  } else {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      if (first + j < s.num_ranks) to[j] = h[j];
    }
  }
  Element* left = static_cast<Element*>(s.left) + token * s.padded_ranks + first;
  *reinterpret_cast<uint4*>(left) = AsWords(u);
}

// 8 ranks of h of a row; zeros beyond the last.
template <class Element>
__device__ inline void LoadRanks(const RankSpace& s, int64_t token, int first,
                                 Element (&h)[kChunk]) {
  const Element* from = static_cast<const Element*>(s.h) + token * s.num_ranks + first;
  if (s.num_ranks == s.padded_ranks) {
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    const uint32_t pairs[] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      h[j].bits = static_cast<uint16_t>(j % 2 == 0 ? pairs[j / 2] : pairs[j / 2] >> 16);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kChunk; ++j) {
    h[j] = first + j < s.num_ranks ? from[j] : Rounded<Element>(0.0f);
  }
}

// dh of 8 ranks of a row; leaves h ⊙ du in the place of du.
template <class Element>
__device__ inline void RankGradientsOfChunk(const RankSpace& s, uint32_t sums, int row,
                                            int64_t token, int first) {
  const SumRow du = SumRowAt(sums, row);
  const float* gates = s.probs + token * s.num_gates + 1;
  Element h[kChunk], dh[kChunk];
  LoadRanks(s, token, first, h);
  ExpertOfRank of(s, first);
#pragma unroll
  for (int j = 0; j < kChunk; ++j) {
    const int rank = first + j;
    dh[j] = Rounded<Element>(0.0f);
    if (rank < s.num_ranks) {
      dh[j] = Rounded<Element>(du[rank] * (s.scaling * gates[of.expert]));
      du[rank] = ToFloat(h[j]) * du[rank];
    }
    of.Advance(s);
  }
  const int stride = s.padded_ranks + s.padded_gates;
  *reinterpret_cast<uint4*>(static_cast<Element*>(s.left) + token * stride + first) = AsWords(dh);
}

// dlogits of a row from h ⊙ du; as RankGradients has them.
template <class Element>
__device__ inline void GateGradientsOfRow(const RankSpace& s, uint32_t sums, int row,
                                          int64_t token) {
  const SumRow products = SumRowAt(sums, row);
  const float* gates = s.probs + token * s.num_gates;
  const float* dgate = s.dgate == nullptr ? nullptr : s.dgate + token * s.num_gates;
  const float backbone = dgate == nullptr ? 0.0f : dgate[0];
  float inner = gates[0] * backbone;
  for (int e = 0; e + 1 < s.num_gates; ++e) {
    float dot = 0.0f;
    for (int i = 0; i < s.expert_rank; ++i) dot += products[e * s.expert_rank + i];
    const float gradient = (dgate == nullptr ? 0.0f : dgate[e + 1]) + s.scaling * dot;
    // Over products that were added up already.
    products[e] = gradient;
    inner += gates[e + 1] * gradient;
  }
  Element* to =
      static_cast<Element*>(s.left) + token * (s.padded_ranks + s.padded_gates) + s.padded_ranks;
  for (int first = 0; first < s.padded_gates; first += kChunk) {
    Element dlogits[kChunk];
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      const int g = first + j;
      float dlogit = 0.0f;
      if (g < s.num_gates) dlogit = gates[g] * ((g == 0 ? backbone : products[g - 1]) - inner);
      dlogits[j] = Rounded<Element>(dlogit);
    }
    *reinterpret_cast<uint4*>(to + first) = AsWords(dlogits);
  }
}

// What is rank-sized of a consumer's rows, two threads a row; rows beyond the last have none.
template <class Element, bool kIsTransposed>
__device__ inline void FinishRows(const RankSpace& s, uint32_t sums, uint32_t consumer, int thread,
                                  int64_t first_token, int64_t num_tokens) {
  const int row = thread % kMmaRows, half = thread / kMmaRows;
  const int64_t token = first_token + row;
  const bool is_row = token < num_tokens;
  hopper::SyncThreads<kGroupThreads>(1 + consumer);
  if constexpr (kIsTransposed) {
    for (int first = half * kChunk; is_row && first < s.padded_ranks; first += 2 * kChunk) {
      RankGradientsOfChunk<Element>(s, sums, row, token, first);
    }
  } else {
    if (is_row && half == 0) GatesOfRow(s, sums, row, token);
  }
  hopper::SyncThreads<kGroupThreads>(1 + consumer);
  if constexpr (kIsTransposed) {
    if (is_row && half == 0) GateGradientsOfRow<Element>(s, sums, row, token);
  } else {
    for (int first = half * kChunk; is_row && first < s.padded_ranks; first += 2 * kChunk) {
      ScaleChunk<Element>(s, sums, row, token, first);
    }
  }
}

// From the sums of the narrow operand to a count that says that u or dz of these rows is there.
template <class Tiles, DType kDType, bool kIsTransposed, int kSize>
__device__ inline void FinishNarrow(const Launch& launch, const RankSpace& ranks, uint32_t shared,
                                    uint32_t consumer, int thread, uint32_t tile,
                                    const float (&narrow)[kSize]) {
  using Element = std::conditional_t<kDType == DType::kBFloat16, BFloat16, Float16>;
  const uint32_t sums = shared + Tiles::Buffer(static_cast<int>(consumer), 0);
  // Both have read the narrow tiles, which lie where the sums of either go.
  hopper::SyncThreads<kConsumers * kGroupThreads>(kBarrierOfConsumers);
  StoreSums(narrow, sums, thread);
  FinishRows<Element, kIsTransposed>(ranks, sums, consumer, thread,
                                     int64_t{tile} * kTileRows + consumer * kMmaRows,
                                     launch.num_rows);
  hopper::FenceProxies();
  hopper::FenceDevice();
  hopper::SyncThreads<kGroupThreads>(1 + consumer);
  if (thread == 0 && HasRows(launch, tile)) hopper::AddToCount(ranks.counts + tile);
}

template <class Tiles>
__device__ inline void LoadBiases(const Launch& launch, int32_t column, int thread,
                                  uint32_t (&bias)[Tiles::kWidth / 8]) {
#pragma unroll
  for (int i = 0; i < Tiles::kWidth / 8; ++i) {
    bias[i] = LoadBias(launch, column + FragmentColumn(thread, 4 * i));
  }
}

template <class Tiles, DType kDType, bool kIsTransposed, int kNarrow>
__device__ inline void ConsumeRouted(const Launch& launch, const RoutedMaps& maps,
                                     const RankSpace& ranks, const Position<Tiles>& position,
                                     uint32_t consumer) {
  const int thread = static_cast<int>(hopper::ThreadIndex()) % kGroupThreads;
  const uint32_t lane = static_cast<uint32_t>(thread) % kWarp;
  const uint32_t shared = position.shared;
  float acc[Tiles::kWidth / 2];
  uint32_t bias[Tiles::kWidth / 8];
  Ring<Tiles::kStages> ring;
  for (uint32_t unit = position.first_unit; unit < launch.NumUnits();
       unit += position.num_clusters) {
    const Place place = PlaceOfRoutedUnit(launch, unit);
    const int32_t column = position.Column(place);
    if (place.column == 0) {
      float narrow[kNarrow / 2];
      MultiplyFirstSteps<Tiles, kDType, kIsTransposed, kNarrow>(launch, shared, consumer, lane,
                                                                &ring, acc, narrow);
      FinishNarrow<Tiles, kDType, kIsTransposed>(launch, ranks, shared, consumer, thread,
                                                 TileOfRows<Tiles>(position, place), narrow);
      LoadBiases<Tiles>(launch, column, thread, bias);
      MultiplyExtension<Tiles, kDType, kIsTransposed>(launch, shared, consumer, lane, &ring, acc);
    } else {
      LoadBiases<Tiles>(launch, column, thread, bias);
      MultiplyUnit<Tiles, kDType, kIsTransposed>(launch, shared, consumer, lane, &ring, acc);
    }
    StoreUnit<Tiles, kDType>(launch, maps.maps.out, shared, consumer, thread,
                             position.Row(place) + static_cast<int32_t>(consumer) * kMmaRows,
                             column, acc, bias);
    if (place.column == 0 && thread == 0) {
      hopper::WaitStoresRead<0>();
      hopper::ArriveHere(shared + Tiles::Stored());
    }
  }
  if (thread == 0) hopper::WaitStoresRead<0>();
}

// The kernel. Grid: whole clusters, all resident at once. There is an extension, of one step.
template <class Tiles, DType kDType, bool kIsTransposed, int kNarrow>
__device__ inline void RunRoutedGemm(const Launch& launch, const RoutedMaps& maps,
                                     const RankSpace& ranks) {
  const Position<Tiles> position = Position<Tiles>::OfBlock();
  const uint32_t warp = hopper::Uniform(hopper::ThreadIndex() / kWarp);
  const uint32_t group = warp / (kGroupThreads / kWarp);
  if (hopper::ThreadIndex() == 0) {
    hopper::InitBarrier(position.shared + Tiles::Stored(), Tiles::kStoredArrivals);
    InitBarriers<Tiles>(position.shared);
  }
  hopper::SyncCluster<Tiles::kCluster>();
  if (group == 0) {
    hopper::ShrinkRegisters<kRoutedProducerRegisters>();
    if (warp == 0 && hopper::ElectLane()) {
      ProduceRouted<Tiles, kIsTransposed, kNarrow>(launch, maps, ranks, position);
    }
    hopper::SyncWarp();
  } else {
    hopper::GrowRegisters<kRoutedConsumerRegisters>();
    ConsumeRouted<Tiles, kDType, kIsTransposed, kNarrow>(launch, maps, ranks, position, group - 1);
    hopper::SyncWarp();
  }
  // No block ends while another may still arrive at its barriers.
  hopper::SyncCluster<Tiles::kCluster>();
}

}  // namespace citi::gemm
