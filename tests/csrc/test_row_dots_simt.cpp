// The CUDA kernels of the row dots, run on the host: values against a naive loop.

// Device code needs its words first.
// clang-format off
#include "simt.h"
#include "cuda/row_dots_plan.h"
// clang-format on
#include "row_dots_cases.h"

namespace citi {
namespace {

template <class Elements>
void RunDots(const RowDotsPlan& plan) {
  simt::Launch(plan.num_blocks, kThreads,
               plan.is_columns ? ColumnDots<Elements> : SegmentDots<Elements>, plan.launch);
}

template <class Score>
void RunSum(const RowDots& dots, const RowDotsPlan& plan) {
  simt::Launch(CeilDiv(dots.num_segments(), plan.scores_per_block), kThreads, SumParts<Score>,
               static_cast<const double*>(plan.launch.parts), static_cast<Score*>(dots.scores.data),
               plan.num_parts, dots.num_segments(), plan.scores_per_block);
}

void Run(const RowDots& dots, const RowDotsPlan& plan) {
  if (!plan.is_aligned) {
    RunDots<AnyElements>(plan);
  } else if (dots.a.dtype == DType::kFloat32) {
    RunDots<AlignedElements<float>>(plan);
  } else if (dots.a.dtype == DType::kBFloat16) {
    RunDots<AlignedElements<BFloat16>>(plan);
  } else {
    RunDots<AlignedElements<Float16>>(plan);
  }
  if (dots.scores.dtype == DType::kFloat64) {
    RunSum<double>(dots, plan);
  } else {
    RunSum<float>(dots, plan);
  }
}

void CheckCase(const Options& options, Layout layout, bool is_aligned,
               DType scores_dtype = DType::kFloat64) {
  std::vector<double> first;
  for (int repeat = 0; repeat < 2; ++repeat) {
    Problem problem(options, layout, scores_dtype);
    const int64_t num_parts =
        PlanParts(options.num_tokens, options.num_features, options.num_segments);
    const RowDots dots = problem.Arguments(num_parts);
    CHECK(Invalid(dots, num_parts) == "", Invalid(dots, num_parts));
    const RowDotsPlan plan = PlanRowDots(dots);
    CHECK(plan.is_aligned == is_aligned, options.Name() + ": takes the other path");
    Run(dots, plan);
    CHECK(problem.IsAccurate(), options.Name() + ": not the truth");
    if (repeat == 0) first = problem.Scores();
    CHECK(problem.Scores() == first, options.Name() + ": other bits at the second run");
  }
}

void CheckValues() {
  const DType f32 = DType::kFloat32, bf16 = DType::kBFloat16, f16 = DType::kFloat16;
  // Aligned: one segment, with an end within a vector; heads; columns of two and more tiles.
  CheckCase({35, 136, 1, bf16, bf16, true, true, false}, Layout::kDense, true);
  CheckCase({37, 528, 1, f32, f32, false, false, true}, Layout::kDense, true);
  CheckCase({33, 128, 4, f16, f16, true, false, false}, Layout::kDense, true);
  CheckCase({17, 2048, 128, f32, f32, false, true, false}, Layout::kDense, true);
  CheckCase({70, 264, 264, bf16, bf16, true, false, false}, Layout::kDense, true);
  CheckCase({3, 24, 24, f32, f32, true, true, true}, Layout::kDense, true);
  // Rows of 51 + 5 features lie aligned, and end within a vector.
  Options ragged{35, 53, 1, bf16, bf16, false, true, false};
  CheckCase(ragged, Layout::kRowsApart, true);
  // Any strides and dtypes.
  CheckCase({35, 130, 1, bf16, f32, true, true, false}, Layout::kDense, false);
  CheckCase({35, 19, 1, f32, f32, true, false, true}, Layout::kTransposed, false);
  CheckCase({35, 130, 10, f16, bf16, true, true, false}, Layout::kColumnsApart, false);
  CheckCase({33, 66, 33, f32, f32, true, false, false}, Layout::kRowsApart, false);
  CheckCase({70, 35, 35, f16, f16, true, true, false}, Layout::kTransposed, false);
  CheckCase({1, 1, 1, f32, f32, false, false, false}, Layout::kDense, false);
  CheckCase({37, 24, 4, f32, f32, true, true, false}, Layout::kColumnsApart, false,
            DType::kFloat32);
}

void CheckPlans() {
  for (const int64_t num_tokens : {1, 15, 16, 2048, 1 << 20}) {
    for (const int64_t num_features : {1, 24, 576, 4096, 14336}) {
      for (const int64_t num_segments : {int64_t{1}, num_features}) {
        const int64_t num_parts = PlanParts(num_tokens, num_features, num_segments);
        CHECK(num_parts >= 1 && num_parts <= num_tokens, "parts without tokens");
        CHECK(num_parts * num_segments <= std::max(kMaxPartSums, num_segments), "too many sums");
      }
    }
  }
}

}  // namespace
}  // namespace citi

int main() {
  citi::CheckPlans();
  citi::CheckValues();
  return citi::Report();
}
