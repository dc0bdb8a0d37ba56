#include "cpu/molora.h"

#include <iterator>
#include <type_traits>

#include "cpu/parallel.h"
#include "whole_numbers.h"

namespace citi {
namespace {

constexpr int64_t kLanes = 16;
// Bits of the least fp32 number that bf16 has no finite one for.
constexpr int32_t kRoundsToInfinity = 0x7f7f8000;

MoloraKernels Select(Variant variant, DType dtype) {
  switch (variant) {
#if defined(CITI_AVX512_BF16_VARIANT)
    case Variant::kAvx512Bf16:
      return MoloraKernelsAvx512Bf16(dtype);
#endif
#if defined(CITI_AVX512_VARIANT)
    case Variant::kAvx512:
      return MoloraKernelsAvx512(dtype);
#endif
#if defined(CITI_AVX2_VARIANT)
    case Variant::kAvx2:
      return MoloraKernelsAvx2(dtype);
#endif
    default:
      return MoloraKernelsPortable(dtype);
  }
}

template <class Problem, int kPhases>
void Run(const Problem& problem, const MoloraPhase<Problem> (&phases)[kPhases],
         int64_t num_threads) {
  for (const MoloraPhase<Problem>& phase : phases) {
    ParallelFor(phase.num_tasks(problem), num_threads,
                [&](int64_t task) { phase.run(problem, task); });
  }
}

// is_in(row, stride of its numbers) for rows until one says no.
template <class IsIn>
bool AllRows(const Matrix& matrix, int64_t num_rows, const IsIn& is_in) {
  const auto all = [&](const auto* numbers) {
    for (int64_t i = 0; i < num_rows; ++i) {
      if (!is_in(numbers + i * matrix.row_stride, matrix.column_stride)) return false;
    }
    return true;
  };
  return matrix.dtype == DType::kFloat32 ? all(static_cast<const float*>(matrix.data))
                                         : all(static_cast<const BFloat16*>(matrix.data));
}

}  // namespace

bool IsZero(const Matrix& matrix, int64_t num_rows, int64_t num_columns) {
  return AllRows(matrix, num_rows, [=](const auto* row, int64_t stride) {
    bool is_zero = true;
    for (int64_t j = 0; j < num_columns; ++j) {
      is_zero = is_zero && ToFloat(row[j * stride]) == 0.0f;
    }
    return is_zero;
  });
}

bool IsFinite(const Matrix& matrix, int64_t num_rows, int64_t num_columns) {
  // The sum of flags of whole numbers, of which a compiler makes vectors where the stride is known.
  const auto num_others = [=](const auto* row, auto stride) {
    int32_t sum = 0;
    for (int64_t j = 0; j < num_columns; ++j) {
      const auto magnitude =
          static_cast<int32_t>(BitsOfFloat(ToFloat(row[j * stride])) & 0x7fffffffu);
      sum += magnitude >= kRoundsToInfinity ? 1 : 0;
    }
    return sum;
  };
  return AllRows(matrix, num_rows, [&](const auto* row, int64_t stride) {
    return (stride == 1 ? num_others(row, std::integral_constant<int64_t, 1>())
                        : num_others(row, stride)) == 0;
  });
}

// At least those of whole blocks, in any variant, and of whole lanes.
static int64_t TokensOfBlocks(const MoloraSizes& sizes) {
  return RoundUp(sizes.num_tokens + kMostMoloraTokens - 1, kLanes);
}

int64_t MoloraForwardWorkspace(const MoloraSizes& sizes, DType dtype, bool has_dropout) {
  if (sizes.num_tokens <= MostFewTokens(dtype) && !has_dropout) {
    if (dtype != DType::kFloat32 || sizes.num_tokens < kFewestInLanes) return 0;
    // x, u and z
    return kLaneTokens * (sizes.num_in + sizes.stacked_rank + sizes.num_rows());
  }
  const int64_t num_tokens = TokensOfBlocks(sizes);
  const int64_t num_lanes =
      has_dropout ? RoundUp(sizes.stacked_rank, kLanes) + RoundUp(sizes.num_gates(), kLanes)
                  : RoundUp(sizes.num_rows(), kLanes);
  return num_lanes * sizes.num_in +
         RoundUp(sizes.num_out, kLanes) * sizes.stacked_rank + num_tokens * sizes.stacked_rank;
}

int64_t MoloraBackwardWorkspace(const MoloraSizes& sizes) {
  const int64_t num_tokens = TokensOfBlocks(sizes);
  return RoundUp(sizes.stacked_rank, kLanes) * sizes.num_out +
         RoundUp(sizes.num_in, kLanes) * sizes.num_rows() +
         num_tokens * (2 * sizes.num_rows() + sizes.stacked_rank);
}

void RunMolora(const MoloraForward& forward, Variant variant, int64_t num_threads) {
  const MoloraKernels kernels = Select(variant, forward.x.dtype);
  if (!forward.is_of_few()) {
    Run(forward, kernels.forward, num_threads);
    return;
  }
  if (forward.x.dtype == DType::kFloat32 && forward.sizes.num_tokens >= kernels.num_in_lanes) {
    Run(forward, kernels.forward_in_lanes, num_threads);
    return;
  }
  float numbers[kFewTokens * (kMaxMoloraRows + kMaxStackedRank)];
  MoloraForward of_few = forward;
  of_few.workspace = {numbers, sizeof(numbers), DType::kFloat32, std::size(numbers)};
  Run(of_few, kernels.forward_of_few, num_threads);
}

void RunMolora(const MoloraBackward& backward, Variant variant, int64_t num_threads) {
  Run(backward, Select(variant, backward.h.dtype).backward, num_threads);
}

}  // namespace citi
