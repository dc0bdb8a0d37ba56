// Tensor cores of sm_80 and later, copies that run beside them, and counts, as functions. Where a
// test runs the threads of a block as threads of the host, tests/csrc/simt_tensor_core.h defines
// them.
//
// Fragments of one warp, g = lane / 4, c = lane % 4 (PTX ISA, mma.m16n8k16):
//   a[0] (g, 2c) and (g, 2c + 1)     a[1] rows + 8     a[2] columns + 8     a[3] both
//   b[0] (k = 2c and 2c + 1, n = g)  b[1] k + 8
//   d[0], d[1] (g, 2c), (g, 2c + 1)  d[2], d[3] rows + 8
// The first of two 16-bit elements is in the lower half of a word.
#pragma once

#include <cstdint>

#include "dtype.h"

#if defined(__CUDACC__)

namespace citi {

__device__ __forceinline__ uint32_t SharedAddress(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Memory that the launch asked for, aligned to 128 bytes.
__device__ __forceinline__ unsigned char* SharedMemory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// Four 8 x 8 matrices: lanes 8 i to 8 i + 7 name the rows, 16 bytes each, of matrix i. Each lane
// gets of matrix i the elements (g, 2c) and (g, 2c + 1) in words[i].
__device__ __forceinline__ void LoadMatrices(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(SharedAddress(row))
               : "memory");
}

// The same of the transposed matrices: (2c, g) and (2c + 1, g).
__device__ __forceinline__ void LoadMatricesTransposed(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(SharedAddress(row))
               : "memory");
}

// d (16 x 8) += a (16 x 16) b (16 x 8), in fp32.
template <class Element>
__device__ __forceinline__ void MultiplyAdd(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1);

template <>
__device__ __forceinline__ void MultiplyAdd<BFloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                      uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void MultiplyAdd<Float16>(float (&d)[4], const uint32_t (&a)[4],
                                                     uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes to shared memory, both aligned to 16; zeros, and no read, where not is_valid.
__device__ __forceinline__ void CopyAsync(void* shared, const void* global, bool is_valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(shared)),
               "l"(global), "r"(is_valid ? 16 : 0)
               : "memory");
}

// Ends a group of this thread's copies.
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all but this thread's last kPending groups have arrived; others' need a barrier too.
template <int kPending>
__device__ __forceinline__ void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// A count of the whole GPU; what was written before it was added to is seen.
__device__ __forceinline__ uint32_t LoadCount(const uint32_t* count) {
  uint32_t found;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(count) : "memory");
  return found;
}

// Two numbers, rounded to nearest even.
template <class Element>
__device__ __forceinline__ uint32_t Pack(float first, float second);

template <>
__device__ __forceinline__ uint32_t Pack<BFloat16>(float first, float second) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}

template <>
__device__ __forceinline__ uint32_t Pack<Float16>(float first, float second) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}

}  // namespace citi

#endif
