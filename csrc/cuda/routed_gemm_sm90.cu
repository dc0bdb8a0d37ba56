#include <cuda_runtime.h>

#include "cuda/extended_gemm.h"
#include "cuda/launch.h"
#include "cuda/routed_gemm.h"
#include "cuda/routed_gemm_plan.h"
#if defined(CITI_SM90A)
#include "cuda/hopper.h"
#include "cuda/wgmma.h"
// Device code needs its words first.
#include "cuda/routed_gemm_kernel.h"
#include "cuda/tensor_maps.h"
#endif

namespace citi {
namespace {

#if defined(CITI_SM90A)
// Other architectures, for which the kernel is empty, may know no clusters.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CITI_CLUSTER(size)
#else
#define CITI_CLUSTER(size) __cluster_dims__(size, 1, 1)
#endif

template <class Tiles, DType kDType, bool kIsTransposed, int kNarrow>
__global__ void CITI_CLUSTER(Tiles::kCluster) __launch_bounds__(gemm::kThreads, 1)
    RoutedGemmKernel(const __grid_constant__ gemm::Launch launch,
                     const __grid_constant__ gemm::RoutedMaps maps,
                     const __grid_constant__ gemm::RankSpace ranks) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  gemm::RunRoutedGemm<Tiles, kDType, kIsTransposed, kNarrow>(launch, maps, ranks);
#elif defined(__CUDA_ARCH__)
  // The launch refuses other devices; were this to run, its output must not pass for a result.
  __trap();
#endif
}

cudaError_t Encode(const RoutedGemm& routed, int narrow, gemm::RoutedMaps* maps) {
  cudaError_t error = gemm::Encode(routed.gemm, &maps->maps);
  decltype(&cuTensorMapEncodeTiled) encode = nullptr;
  if (error == cudaSuccess) error = gemm::GetEncodeTiled(&encode);
  if (error != cudaSuccess) return error;
  return gemm::Encode(encode, gemm::NarrowShapeOf(routed, narrow), routed.narrow.dtype,
                      &maps->narrow);
}

// Blocks wait for one another: all of them are resident, or the launch fails.
template <class... Arguments>
cudaError_t LaunchTogether(void (*kernel)(Arguments...), int64_t num_blocks, int shared_bytes,
                           cudaStream_t stream, Arguments... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  const cudaError_t error =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(num_blocks));
  config.blockDim = dim3(gemm::kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  void* pointers[] = {&arguments...};
  return cudaLaunchKernelExC(&config, function, pointers);
}

template <class Tiles, DType kDType, bool kIsTransposed, int kNarrow>
cudaError_t LaunchKernel(const RoutedGemm& routed, int num_multiprocessors, cudaStream_t stream) {
  const auto kernel = RoutedGemmKernel<Tiles, kDType, kIsTransposed, kNarrow>;
  gemm::RoutedMaps maps;
  const cudaError_t error = Encode(routed, kNarrow, &maps);
  if (error != cudaSuccess) return error;
  return LaunchTogether(kernel, gemm::NumBlocks<Tiles>(routed.gemm, num_multiprocessors),
                        Tiles::kSharedBytes, stream, gemm::PlanLaunch<Tiles>(routed.gemm), maps,
                        gemm::RankSpaceOf(routed));
}

template <class Tiles, DType kDType>
cudaError_t LaunchKernel(const RoutedGemm& routed, int num_multiprocessors, cudaStream_t stream) {
  constexpr int kSmall = gemm::kSmallNarrow, kLarge = gemm::kMaxNarrow;
  constexpr int kSmallTransposed = gemm::kSmallTransposedNarrow;
  const auto launch =
      routed.gemm.is_input_gradient
          ? (gemm::TakesSmallTransposedNarrow(routed)
                 ? LaunchKernel<Tiles, kDType, true, kSmallTransposed>
                 : LaunchKernel<Tiles, kDType, true, kLarge>)
          : (gemm::TakesSmallNarrow(routed) ? LaunchKernel<Tiles, kDType, false, kSmall>
                                            : LaunchKernel<Tiles, kDType, false, kLarge>);
  return launch(routed, num_multiprocessors, stream);
}

template <class Tiles>
cudaError_t LaunchKernel(const RoutedGemm& routed, int num_multiprocessors, cudaStream_t stream) {
  return routed.gemm.left.dtype == DType::kBFloat16
             ? LaunchKernel<Tiles, DType::kBFloat16>(routed, num_multiprocessors, stream)
             : LaunchKernel<Tiles, DType::kFloat16>(routed, num_multiprocessors, stream);
}

cudaError_t LaunchKernel(const RoutedGemm& routed, int device, cudaStream_t stream) {
  int num_multiprocessors = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  return gemm::TakesWideRoutedTiles(routed, num_multiprocessors)
             ? LaunchKernel<gemm::WideRoutedTiles>(routed, num_multiprocessors, stream)
             : LaunchKernel<gemm::NarrowRoutedTiles>(routed, num_multiprocessors, stream);
}
#else
cudaError_t LaunchKernel(const RoutedGemm&, int, cudaStream_t) { return cudaErrorNotSupported; }
#endif

}  // namespace

cudaError_t RoutedGemmCuda(const RoutedGemm& routed, int device, cudaStream_t stream,
                           std::string* problem) {
  cudaError_t error = CheckOnDevice(routed.gemm, device, problem);
  if (error != cudaSuccess || !problem->empty()) return error;
  const Placed tensors[] = {{routed.gemm.is_input_gradient ? "b" : "stack", routed.narrow.data},
                            {"h", routed.h.data},
                            {"probs", routed.probs.data},
                            {"dgate", routed.dgate.data},
                            {"counts", routed.counts.data}};
  error = CheckOnDevice(tensors, device, problem);
  if (error != cudaSuccess || !problem->empty()) return error;
  const CurrentDevice current(device);
  if (current.error() != cudaSuccess) return current.error();
  return LaunchKernel(routed, device, stream);
}

}  // namespace citi
