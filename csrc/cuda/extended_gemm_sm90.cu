#include <cuda_runtime.h>

#include "cuda/extended_gemm.h"
#include "cuda/extended_gemm_plan.h"
#include "cuda/launch.h"
#if defined(CITI_SM90A)
#include "cuda/hopper.h"
#include "cuda/wgmma.h"
// Device code needs its words first.
#include "cuda/extended_gemm_kernel.h"
#include "cuda/tensor_maps.h"
#endif

namespace citi {
namespace {

#if defined(CITI_SM90A)
constexpr bool kIsBuilt = true;

// Other architectures, for which the kernel is empty, may know no clusters.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CITI_CLUSTER(size)
#else
#define CITI_CLUSTER(size) __cluster_dims__(size, 1, 1)
#endif

template <class Tiles, DType kDType, bool kIsTransposed>
__global__ void CITI_CLUSTER(Tiles::kCluster) __launch_bounds__(gemm::kThreads, 1)
    ExtendedGemmKernel(const __grid_constant__ gemm::Launch launch,
                       const __grid_constant__ gemm::Maps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  gemm::RunExtendedGemm<Tiles, kDType, kIsTransposed>(launch, maps);
#elif defined(__CUDA_ARCH__)
  // The launch refuses other devices; were this to run, its output must not pass for a result.
  __trap();
#endif
}

template <class Tiles, DType kDType, bool kIsTransposed>
cudaError_t LaunchKernel(const ExtendedGemm& problem, int num_multiprocessors,
                         cudaStream_t stream) {
  const auto kernel = ExtendedGemmKernel<Tiles, kDType, kIsTransposed>;
  gemm::Maps maps;
  const cudaError_t error = gemm::Encode(problem, &maps);
  if (error != cudaSuccess) return error;
  return Launch(kernel, gemm::NumBlocks<Tiles>(problem, num_multiprocessors), gemm::kThreads,
                Tiles::kSharedBytes, stream, gemm::PlanLaunch<Tiles>(problem), maps);
}

template <class Tiles>
cudaError_t LaunchKernel(const ExtendedGemm& problem, int num_multiprocessors,
                         cudaStream_t stream) {
  constexpr DType kBFloat16 = DType::kBFloat16, kFloat16 = DType::kFloat16;
  const bool is_bfloat16 = problem.left.dtype == kBFloat16;
  const auto launch = problem.is_input_gradient
                          ? (is_bfloat16 ? LaunchKernel<Tiles, kBFloat16, true>
                                         : LaunchKernel<Tiles, kFloat16, true>)
                          : (is_bfloat16 ? LaunchKernel<Tiles, kBFloat16, false>
                                         : LaunchKernel<Tiles, kFloat16, false>);
  return launch(problem, num_multiprocessors, stream);
}

cudaError_t LaunchKernel(const ExtendedGemm& problem, int device, cudaStream_t stream) {
  int num_multiprocessors = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  return gemm::TakesWideTiles(problem, num_multiprocessors)
             ? LaunchKernel<gemm::WideTiles>(problem, num_multiprocessors, stream)
             : LaunchKernel<gemm::NarrowTiles>(problem, num_multiprocessors, stream);
}
#else
constexpr bool kIsBuilt = false;

cudaError_t LaunchKernel(const ExtendedGemm&, int, cudaStream_t) { return cudaErrorNotSupported; }
#endif

}  // namespace

cudaError_t CheckOnDevice(const ExtendedGemm& gemm, int device, std::string* problem) {
  const ExtendedGemmNames names = NamesOf(gemm);
  const bool extends = gemm.more > 0;
  const Placed tensors[] = {{names.left, gemm.left.data},
                            {names.right, gemm.right.data},
                            {"bias", gemm.bias.data},
                            {names.more_left, extends ? gemm.more_left.data : nullptr},
                            {names.more_right, extends ? gemm.more_right.data : nullptr},
                            {names.out, gemm.out.data}};
  cudaError_t error = CheckOnDevice(tensors, device, problem);
  if (error != cudaSuccess || !problem->empty()) return error;
  int major = 0, minor = 0;
  error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) return error;
  if (major != 9 || minor != 0) {
    *problem = "device: must be of compute capability 9.0, got " + std::to_string(major) + "." +
               std::to_string(minor);
  } else if (!kIsBuilt) {
    *problem = "device: citi_kernels._C was built without sm_90a (CITI_CUDA_ARCHS)";
  }
  return cudaSuccess;
}

cudaError_t ExtendedGemmCuda(const ExtendedGemm& gemm, int device, cudaStream_t stream) {
  const CurrentDevice current(device);
  if (current.error() != cudaSuccess) return current.error();
  return LaunchKernel(gemm, device, stream);
}

}  // namespace citi
