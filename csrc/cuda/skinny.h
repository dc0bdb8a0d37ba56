// The skinny passes of a MOLoRA layer on a CUDA GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "skinny_arguments.h"

namespace citi {

// Into how many parts K is cut; sizes are those that `InvalidSize` lets through.
int64_t ShrinkCudaSplits(int64_t num_tokens, int64_t num_inputs);

// Tiles of the wide matrix and shares of the tokens.
struct FactorParts {
  int64_t num_tiles, num_shares;
};
FactorParts FactorCudaParts(int64_t num_tokens, int64_t num_columns, int64_t num_narrow,
                            bool gives_ranks);

// Each writes which argument does not lie on this device to *problem, or leaves it and launches on
// this stream; valid arguments (`Invalid`).
cudaError_t PackRowsCuda(const PackArguments& arguments, int device, cudaStream_t stream,
                         std::string* problem);
cudaError_t ShrinkCuda(const ShrinkArguments& arguments, int device, cudaStream_t stream,
                       std::string* problem);
cudaError_t RowProductCuda(const RowProductArguments& arguments, int device, cudaStream_t stream,
                           std::string* problem);
cudaError_t FactorGradientsCuda(const FactorArguments& arguments, int device, cudaStream_t stream,
                                std::string* problem);
cudaError_t ScaleRanksCuda(const ScaleArguments& arguments, int device, cudaStream_t stream,
                           std::string* problem);
cudaError_t RankGradientsCuda(const RankArguments& arguments, int device, cudaStream_t stream,
                              std::string* problem);
cudaError_t SumSharesCuda(const SumArguments& arguments, int device, cudaStream_t stream,
                          std::string* problem);
cudaError_t InputUpdateCuda(const InputUpdateArguments& arguments, int device, cudaStream_t stream,
                            std::string* problem);
cudaError_t AddNonFiniteCuda(const NonFiniteArguments& arguments, int device, cudaStream_t stream,
                             std::string* problem);

}  // namespace citi
