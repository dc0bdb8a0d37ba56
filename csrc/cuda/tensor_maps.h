// Matrices as TMA sees them, for the GEMMs on Hopper.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "cuda/extended_gemm_kernel.h"

namespace citi::gemm {

// Of the driver, without a link to it.
inline cudaError_t GetEncodeTiled(decltype(&cuTensorMapEncodeTiled)* encode) {
  constexpr const char* kName = "cuTensorMapEncodeTiled";
  cudaDriverEntryPointQueryResult result;
  void* entry = nullptr;
#if CUDART_VERSION < 12050  // the other came with 12.5, and this one is gone from 13 on
  const cudaError_t error = cudaGetDriverEntryPoint(kName, &entry, cudaEnableDefault, &result);
#else
  constexpr unsigned kSince = 12000;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(kName, &entry, kSince, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess) return error;
  if (result != cudaDriverEntryPointSuccess) return cudaErrorSymbolNotFound;
  *encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  return cudaSuccess;
}

inline cudaError_t Encode(decltype(&cuTensorMapEncodeTiled) encode, const MapShape& shape,
                          DType dtype, CUtensorMap* map) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(shape.columns),
                              static_cast<cuuint64_t>(shape.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(shape.row_bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(shape.box_columns),
                            static_cast<cuuint32_t>(shape.box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUtensorMapDataType type = dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result =
      encode(map, type, 2, const_cast<void*>(shape.data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

inline cudaError_t Encode(const ExtendedGemm& problem, Maps* maps) {
  decltype(&cuTensorMapEncodeTiled) encode = nullptr;
  cudaError_t error = GetEncodeTiled(&encode);
  const MapShapes shapes = ShapesOf(problem);
  const auto add = [&](const MapShape& shape, CUtensorMap* map) {
    if (error == cudaSuccess) error = Encode(encode, shape, problem.left.dtype, map);
  };
  for (int i = 0; i < 2; ++i) {
    add(shapes.left[i], &maps->left[i]);
    add(shapes.right[i], &maps->right[i]);
  }
  add(shapes.out, &maps->out);
  return error;
}

}  // namespace citi::gemm
