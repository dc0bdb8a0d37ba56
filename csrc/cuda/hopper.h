// Instructions of sm_90a that CUDA C++ has no words for: mbarriers, TMA, warp-group registers,
// clusters. Matrix products are in wgmma.h. Addresses are those of shared memory, in 32 bits.
//
// A test has a model of all of these with the same names, and runs the kernel on the host.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "dtype.h"

namespace citi::hopper {

using TensorMap = CUtensorMap;

__device__ inline uint32_t ThreadIndex() { return threadIdx.x; }
__device__ inline uint32_t BlockIndex() { return blockIdx.x; }
__device__ inline uint32_t NumBlocks() { return gridDim.x; }

__device__ inline uint32_t SharedBase() {
  extern __shared__ uint8_t shared[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// The first lane's value, known to be that of the whole warp.
__device__ inline uint32_t Uniform(uint32_t value) { return __shfl_sync(0xffffffffu, value, 0); }

__device__ inline void SyncWarp() { __syncwarp(); }

// Whether this is the one lane of a converged warp that was chosen.
__device__ inline bool ElectLane() {
  uint32_t is_chosen;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(is_chosen)
               :
               : "memory");
  return is_chosen != 0;
}

// All threads of a warp group. Together the groups of a block keep within its registers.
template <int kRegisters>
__device__ inline void ShrinkRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void GrowRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Of the threads that name the barrier; 0 is that of __syncthreads.
template <int kNumThreads>
__device__ inline void SyncThreads(uint32_t barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kNumThreads) : "memory");
}

// All threads of the cluster, converged in warps.
template <int kCluster>
__device__ inline void SyncCluster() {
  if constexpr (kCluster == 1) {
    __syncthreads();
  } else {
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::
            : "memory");
  }
}

template <int kCluster>
__device__ inline uint32_t RankInCluster() {
  if constexpr (kCluster == 1) return 0;
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline void InitBarrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Initialised barriers, seen by the cluster and by TMA.
__device__ inline void FenceInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Until the phase of this parity is complete. Of a new barrier the phase before, parity 1, is.
// Of the scope of a block also in a cluster: what it orders is TMA and wgmma, both done when they
// are counted, and an acquire of the cluster would empty L1 each time.
__device__ inline void WaitBarrier(uint32_t barrier, uint32_t parity) {
  uint32_t is_complete;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(is_complete)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (is_complete == 0);
}

// Arrives, and adds bytes to be written before the phase is complete.
__device__ inline void ArriveAndExpect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// At the same barrier of a block of the cluster.
template <int kCluster>
__device__ inline void Arrive(uint32_t barrier, uint32_t rank) {
  if constexpr (kCluster == 1) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
  } else {
    asm volatile(
        "{\n.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
        "r"(rank)
        : "memory");
  }
}

// At a barrier of this block.
__device__ inline void ArriveHere(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// A box from global to shared memory; what lies outside of the matrix is zero. The barrier is told
// of the bytes of the whole box.
__device__ inline void LoadBox(const TensorMap& map, uint32_t to, uint32_t barrier, int32_t column,
                               int32_t row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// The same, with a policy for L2.
__device__ inline void LoadBox(const TensorMap& map, uint32_t to, uint32_t barrier, int32_t column,
                               int32_t row, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "l"(policy)
      : "memory");
}

// The same to every block of the cluster in the mask, there at the same offsets.
__device__ inline void LoadBoxToCluster(const TensorMap& map, uint32_t to, uint32_t barrier,
                                        int32_t column, int32_t row, uint16_t mask,
                                        uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "h"(mask), "l"(policy)
      : "memory");
}

// A box from shared to global memory, without what lies outside of the matrix.
__device__ inline void StoreBox(const TensorMap& map, uint32_t from, int32_t column, int32_t row,
                                uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group.L2::cache_hint"
      " [%0, {%2, %3}], [%1], %4;" ::"l"(&map),
      "r"(from), "r"(column), "r"(row), "l"(policy)
      : "memory");
}

// Stores of this thread since the last commit are a group, which may be empty.
__device__ inline void CommitStores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until no more than kPending groups of this thread have yet to read shared memory.
template <int kPending>
__device__ inline void WaitStoresRead() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// What this thread wrote to shared memory is seen by TMA operations after it.
__device__ inline void FenceSharedWrites() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Four 8 x 8 matrices of 16 bits: lanes 8 j to 8 j + 7 name the rows of matrix j, lane l holds
// elements 2 (l % 4) and the next of row l / 4 of each.
__device__ inline void StoreMatrices(uint32_t row, const uint32_t (&values)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(values[0]), "r"(values[1]), "r"(values[2]), "r"(values[3])
               : "memory");
}

// Floats in shared memory, for ordinary loads and stores.
__device__ inline float* SharedFloats(uint32_t address) {
  return static_cast<float*>(__cvta_shared_to_generic(address));
}

// What this thread wrote to any memory is seen by TMA operations after it; and what it has seen of
// other threads' writes, by TMA operations that it issues.
__device__ inline void FenceProxies() { asm volatile("fence.proxy.async;" ::: "memory"); }

// What this thread wrote is seen by the whole GPU before what it writes next.
__device__ inline void FenceDevice() { __threadfence(); }

// Adds 1, behind all that this thread wrote or has seen.
__device__ inline void AddToCount(uint32_t* count) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
}

// Until the count is there, and with it what was written before it. A kernel that can never go on
// ends with an error: these are seconds.
__device__ inline void WaitForCount(const uint32_t* count, uint32_t wanted) {
  constexpr uint32_t kMaxPolls = 1u << 25;
  uint32_t found;
#pragma unroll 1
  for (uint32_t poll = 0; poll < kMaxPolls; ++poll) {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(count) : "memory");
    if (found >= wanted) return;
    __nanosleep(32);
  }
  __trap();
}

// Two values, rounded; `low` in the lower half.
template <DType kDType>
__device__ inline uint32_t Pack(float low, float high) {
  uint32_t packed;
  if constexpr (kDType == DType::kBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

}  // namespace citi::hopper
