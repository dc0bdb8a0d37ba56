#include "cpu/row_dots.h"

#include <algorithm>

#include "cpu/parallel.h"
#include "whole_numbers.h"

namespace citi {
namespace {

// A part is worth a thread's while, and its sums are few beside the elements that it reads.
constexpr int64_t kElementsPerPart = 65536;
constexpr int64_t kElementsPerSum = 64;
// 16 MiB of sums.
constexpr int64_t kMaxSums = int64_t{1} << 21;
constexpr int64_t kMaxParts = 512;
constexpr int64_t kSegmentsPerTask = 1024;

RowDotsOfTokens* Select(Variant variant) {
  switch (variant) {
#if defined(CITI_AVX512_VARIANT)
    case Variant::kAvx512Bf16:
    case Variant::kAvx512:
      return RowDotsOfTokensAvx512;
#endif
#if defined(CITI_AVX2_VARIANT)
    case Variant::kAvx2:
      return RowDotsOfTokensAvx2;
#endif
    default:
      return RowDotsOfTokensPortable;
  }
}

template <class Score>
void AddParts(const RowDots& dots, int64_t num_parts, int64_t begin, int64_t end) {
  const int64_t num_segments = dots.num_segments();
  const double* parts = static_cast<const double*>(dots.parts.data);
  Score* scores = static_cast<Score*>(dots.scores.data);
  for (int64_t s = begin; s < end; ++s) {
    double sum = 0.0;
    for (int64_t part = 0; part < num_parts; ++part) sum += parts[part * num_segments + s];
    scores[s] = static_cast<Score>(static_cast<double>(scores[s]) + sum);
  }
}

}  // namespace

int64_t RowDotsParts(int64_t num_tokens, int64_t num_features, int64_t num_segments) {
  const int64_t for_work = CeilDiv(kElementsPerPart, num_features);
  const int64_t for_sums = CeilDiv(kElementsPerSum * num_segments, num_features);
  const int64_t most = std::clamp(kMaxSums / num_segments, int64_t{1}, kMaxParts);
  return std::clamp(num_tokens / std::max(for_work, for_sums), int64_t{1}, most);
}

void AccumulateRowDots(const RowDots& dots, Variant variant, int64_t num_threads) {
  const int64_t num_segments = dots.num_segments();
  const int64_t num_parts = RowDotsParts(dots.num_tokens, dots.num_features, num_segments);
  double* parts = static_cast<double*>(dots.parts.data);
  RowDotsOfTokens* const row_dots_of_tokens = Select(variant);
  const int64_t tokens = dots.num_tokens / num_parts;
  const int64_t longer = dots.num_tokens % num_parts;
  ParallelFor(num_parts, num_threads, [&](int64_t part) {
    // The first parts have one token more.
    const int64_t begin = part * tokens + std::min(part, longer);
    const int64_t end = begin + tokens + (part < longer ? 1 : 0);
    row_dots_of_tokens(dots, begin, end, parts + part * num_segments);
  });
  ParallelFor(CeilDiv(num_segments, kSegmentsPerTask), num_threads, [&](int64_t task) {
    const int64_t begin = task * kSegmentsPerTask;
    const int64_t end = std::min(begin + kSegmentsPerTask, num_segments);
    if (dots.scores.dtype == DType::kFloat64) {
      AddParts<double>(dots, num_parts, begin, end);
    } else {
      AddParts<float>(dots, num_parts, begin, end);
    }
  });
}

}  // namespace citi
