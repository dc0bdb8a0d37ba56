// MOLoRA on the CPU.
#pragma once

#include "cpu/cpu_features.h"
#include "molora_arguments.h"

namespace citi {

// The most tokens that pass through the rank space together, in any variant.
constexpr int64_t kMostMoloraTokens = 40;

// Entries of the workspaces, whatever the variant; the sizes must be valid.
int64_t MoloraForwardWorkspace(const MoloraSizes& sizes, DType dtype, bool has_dropout);
int64_t MoloraBackwardWorkspace(const MoloraSizes& sizes);

// Whether no entry differs from 0; of a trained b the first one tells. The matrix must be valid.
bool IsZero(const Matrix& matrix, int64_t num_rows, int64_t num_columns);
// Whether no entry is NaN or infinite, or would be when rounded to bf16. The matrix must be valid.
bool IsFinite(const Matrix& matrix, int64_t num_rows, int64_t num_columns);

// The arguments must be valid (`Invalid`), the variant runnable.
void RunMolora(const MoloraForward& forward, Variant variant, int64_t num_threads);
void RunMolora(const MoloraBackward& backward, Variant variant, int64_t num_threads);

// Phases run one after another; the tasks of a phase in any order, at the same time.
template <class Problem>
struct MoloraPhase {
  int64_t (*num_tasks)(const Problem& problem);
  void (*run)(const Problem& problem, int64_t task);
};

struct MoloraKernels {
  MoloraPhase<MoloraForward> forward[2];
  MoloraPhase<MoloraForward> forward_of_few[3];
  MoloraPhase<MoloraForward> forward_in_lanes[4];  // of few in fp32, from num_in_lanes on
  MoloraPhase<MoloraBackward> backward[3];
  int64_t num_in_lanes;
};

// For x of this dtype, fp32 or bf16. One for each variant.
using MoloraKernelsOf = MoloraKernels(DType dtype);
MoloraKernelsOf MoloraKernelsPortable;
MoloraKernelsOf MoloraKernelsAvx2;
MoloraKernelsOf MoloraKernelsAvx512;
MoloraKernelsOf MoloraKernelsAvx512Bf16;

}  // namespace citi
