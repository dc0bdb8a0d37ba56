// Matrix products of a warp group (wgmma) on sm_90a: 64 rows, 16 of depth, both operands in shared
// memory, 16-bit elements, sums in fp32.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace citi::hopper {

// Before the first product of a batch, and after its accumulators were written.
__device__ inline void FenceProducts() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Products since the last commit are a batch.
__device__ inline void CommitProducts() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until no more than kPending batches are under way.
template <int kPending>
__device__ inline void WaitProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The compiler moves no access of the accumulators across this.
template <int kSize>
__device__ inline void FenceAccumulators(float (&acc)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

// The names of an instruction's accumulators, and what they stand for.
#define CITI_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define CITI_NAMES_20 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19"
#define CITI_NAMES_32                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define CITI_NAMES_64                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define CITI_NAMES_128                                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define CITI_SUMS_8(acc, i)                                                             \
  "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), \
      "+f"(acc[i + 5]), "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define CITI_SUMS_16(acc, i) CITI_SUMS_8(acc, i), CITI_SUMS_8(acc, i + 8)
#define CITI_SUMS_20(acc, i)                                                          \
  CITI_SUMS_8(acc, i), CITI_SUMS_8(acc, i + 8), "+f"(acc[i + 16]), "+f"(acc[i + 17]), \
      "+f"(acc[i + 18]), "+f"(acc[i + 19])
#define CITI_SUMS_32(acc, i) \
  CITI_SUMS_8(acc, i), CITI_SUMS_8(acc, i + 8), CITI_SUMS_8(acc, i + 16), CITI_SUMS_8(acc, i + 24)
#define CITI_SUMS_64(acc, i) CITI_SUMS_32(acc, i), CITI_SUMS_32(acc, i + 32)
#define CITI_SUMS_128(acc, i) CITI_SUMS_64(acc, i), CITI_SUMS_64(acc, i + 64)

// After the accumulators: two descriptors, adds to them, signs, A not transposed, B as told.
#define CITI_PRODUCT(shape, dtype, names, left, right, trans, ...)                                 \
  asm volatile("wgmma.mma_async.sync.aligned." shape ".f32." dtype "." dtype " {" names "}, " left \
               ", " right ", 1, 1, 1, 0, " trans ";"                                               \
               : __VA_ARGS__                                                                       \
               : "l"(left_descriptor), "l"(right_descriptor), "n"(kIsColumnMajor ? 1 : 0)          \
               : "memory")

// acc (64, width) += left (64, 16) · right (16, width), by all threads of a warp group. The right
// operand lies in rows of depth, or of columns where kIsColumnMajor.
template <DType kDType, bool kIsColumnMajor>
__device__ inline void Multiply(float (&acc)[16], uint64_t left_descriptor,
                                uint64_t right_descriptor) {
  if constexpr (kDType == DType::kBFloat16) {
    CITI_PRODUCT("m64n32k16", "bf16", CITI_NAMES_16, "%16", "%17", "%18", CITI_SUMS_16(acc, 0));
  } else {
    CITI_PRODUCT("m64n32k16", "f16", CITI_NAMES_16, "%16", "%17", "%18", CITI_SUMS_16(acc, 0));
  }
}

template <DType kDType, bool kIsColumnMajor>
__device__ inline void Multiply(float (&acc)[20], uint64_t left_descriptor,
                                uint64_t right_descriptor) {
  if constexpr (kDType == DType::kBFloat16) {
    CITI_PRODUCT("m64n40k16", "bf16", CITI_NAMES_20, "%20", "%21", "%22", CITI_SUMS_20(acc, 0));
  } else {
    CITI_PRODUCT("m64n40k16", "f16", CITI_NAMES_20, "%20", "%21", "%22", CITI_SUMS_20(acc, 0));
  }
}

template <DType kDType, bool kIsColumnMajor>
__device__ inline void Multiply(float (&acc)[32], uint64_t left_descriptor,
                                uint64_t right_descriptor) {
  if constexpr (kDType == DType::kBFloat16) {
    CITI_PRODUCT("m64n64k16", "bf16", CITI_NAMES_32, "%32", "%33", "%34", CITI_SUMS_32(acc, 0));
  } else {
    CITI_PRODUCT("m64n64k16", "f16", CITI_NAMES_32, "%32", "%33", "%34", CITI_SUMS_32(acc, 0));
  }
}

template <DType kDType, bool kIsColumnMajor>
__device__ inline void Multiply(float (&acc)[64], uint64_t left_descriptor,
                                uint64_t right_descriptor) {
  if constexpr (kDType == DType::kBFloat16) {
    CITI_PRODUCT("m64n128k16", "bf16", CITI_NAMES_64, "%64", "%65", "%66", CITI_SUMS_64(acc, 0));
  } else {
    CITI_PRODUCT("m64n128k16", "f16", CITI_NAMES_64, "%64", "%65", "%66", CITI_SUMS_64(acc, 0));
  }
}

template <DType kDType, bool kIsColumnMajor>
__device__ inline void Multiply(float (&acc)[128], uint64_t left_descriptor,
                                uint64_t right_descriptor) {
  if constexpr (kDType == DType::kBFloat16) {
    CITI_PRODUCT("m64n256k16", "bf16", CITI_NAMES_128, "%128", "%129", "%130",
                 CITI_SUMS_128(acc, 0));
  } else {
    CITI_PRODUCT("m64n256k16", "f16", CITI_NAMES_128, "%128", "%129", "%130",
                 CITI_SUMS_128(acc, 0));
  }
}

#undef CITI_PRODUCT
#undef CITI_SUMS_128
#undef CITI_SUMS_64
#undef CITI_SUMS_32
#undef CITI_SUMS_20
#undef CITI_SUMS_16
#undef CITI_SUMS_8
#undef CITI_NAMES_128
#undef CITI_NAMES_64
#undef CITI_NAMES_32
#undef CITI_NAMES_20
#undef CITI_NAMES_16

}  // namespace citi::hopper
