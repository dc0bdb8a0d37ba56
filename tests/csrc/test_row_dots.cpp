// Row dots on the CPU: values against a naive loop; variants, threads and layouts bit by bit.

#include "cpu/row_dots.h"
#include "row_dots_cases.h"

namespace citi {
namespace {

constexpr DType kFloating[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};
constexpr int64_t kShapes[][3] = {{1, 1, 1},    {37, 19, 1},   {37, 19, 19}, {5, 130, 10},
                                  {9, 130, 65}, {33, 48, 3},   {3, 1031, 1}, {70, 257, 257},
                                  {4, 700, 2},  {2, 600, 300}, {0, 0, 0}};

std::vector<double> Run(const Options& options, Layout layout, Variant variant, int64_t threads,
                        bool* is_accurate, DType scores_dtype = DType::kFloat64) {
  Problem problem(options, layout, scores_dtype);
  const int64_t num_parts =
      RowDotsParts(options.num_tokens, options.num_features, options.num_segments);
  const RowDots dots = problem.Arguments(num_parts);
  CHECK(Invalid(dots, num_parts) == "", Invalid(dots, num_parts));
  AccumulateRowDots(dots, variant, threads);
  *is_accurate = problem.IsAccurate();
  return problem.Scores();
}

void CheckCase(const Options& options) {
  bool is_accurate = false;
  const std::vector<double> expected =
      Run(options, Layout::kDense, Variant::kPortable, 1, &is_accurate);
  CHECK(is_accurate, options.Name() + ": not the truth");
  for (const Variant variant : RunnableVariants()) {
    for (const Layout layout : kLayouts) {
      const std::vector<double> scores = Run(options, layout, variant, 3, &is_accurate);
      CHECK(scores == expected, options.Name() + ": other bits in variant " + NameOf(variant) +
                                    ", layout " + std::to_string(static_cast<int>(layout)));
    }
  }
}

void CheckValues() {
  int number = 0;
  for (const auto& shape : kShapes) {
    if (shape[0] == 0) break;
    for (const DType a : kFloating) {
      for (const DType b : kFloating) {
        // Every combination of the three options comes up in every shape.
        ++number;
        CheckCase({shape[0], shape[1], shape[2], a, b, (number & 1) != 0, (number & 2) != 0,
                   (number & 4) != 0});
      }
    }
  }
}

void CheckThreads() {
  for (const int64_t num_segments : {int64_t{1}, int64_t{24}, int64_t{3000}}) {
    const Options options{num_segments == 3000 ? 200 : 9000,
                          num_segments == 1 ? 20 : num_segments,
                          num_segments,
                          DType::kBFloat16,
                          DType::kBFloat16,
                          true,
                          false,
                          false};
    const int64_t num_parts =
        RowDotsParts(options.num_tokens, options.num_features, options.num_segments);
    CHECK(num_parts > 1, "no work for several threads");
    bool is_accurate = false;
    const auto expected = Run(options, Layout::kDense, RunnableVariants()[0], 1, &is_accurate);
    for (const int64_t threads : {2, 3, 8}) {
      CHECK(Run(options, Layout::kDense, RunnableVariants()[0], threads, &is_accurate) == expected,
            options.Name() + ": other bits with " + std::to_string(threads) + " threads");
    }
  }
}

void CheckFloatScores() {
  bool is_accurate = false;
  Run({37, 24, 4, DType::kFloat32, DType::kFloat32, true, true, false}, Layout::kDense,
      RunnableVariants()[0], 2, &is_accurate, DType::kFloat32);
  CHECK(is_accurate, "fp32 scores: not the truth");
}

void CheckEveryHalf() {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    alignas(8) char memory[8] = {};
    std::memcpy(memory, &half, sizeof half);
    for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
      const double truth = Decode(dtype, memory);
      const auto ours = static_cast<double>(dtype == DType::kFloat16 ? ToFloat(Float16{half})
                                                                     : ToFloat(BFloat16{half}));
      const bool is_equal = std::isnan(truth)
                                ? std::isnan(ours)
                                : ours == truth && std::signbit(ours) == std::signbit(truth);
      if (!is_equal) CHECK(false, "bits " + std::to_string(bits) + " are another number");
    }
  }
}

void CheckNan() {
  // NaN of a token that counts shows in its segment and nowhere else.
  const Options options{9, 40, 4, DType::kFloat32, DType::kFloat32, false, false, false};
  Problem problem(options, Layout::kDense);
  PutNan(DType::kFloat32, problem.a.At(5, 17));
  const int64_t num_parts = RowDotsParts(9, 40, 4);
  AccumulateRowDots(problem.Arguments(num_parts), RunnableVariants()[0], 1);
  const std::vector<double> scores = problem.Scores();
  for (size_t s = 0; s < 4; ++s) CHECK(std::isnan(scores[s]) == (s == 1), "NaN in another segment");
}

// Expects a message that begins with this name.
void CheckRefused(const RowDots& dots, int64_t num_parts, const std::string& name) {
  const std::string message = Invalid(dots, num_parts);
  CHECK(message.compare(0, name.size(), name) == 0, "wanted " + name + ", got: " + message);
}

void CheckArguments() {
  Problem problem({6, 8, 4, DType::kFloat32, DType::kFloat32, true, true, false}, Layout::kDense);
  const RowDots valid = problem.Arguments(2);
  CHECK(Invalid(valid, 2) == "", "valid arguments are refused");
  RowDots dots = valid;
  const auto refused = [&](const char* name) {
    CheckRefused(dots, 2, name);
    dots = valid;
  };
  dots.num_tokens = 0, refused("num_tokens");
  dots.num_features = INT64_MAX, refused("num_features");
  dots.scores.size = 3, refused("scores");
  dots.scores.dtype = DType::kFloat16, refused("scores");
  dots.scores.num_bytes -= 1, refused("scores");
  dots.a.data = nullptr, refused("a: data");
  dots.a.data = static_cast<const char*>(dots.a.data) + 1, refused("a: data");
  dots.a.num_bytes -= 1, refused("a: shape and strides");
  dots.a.row_stride += 1, refused("a: shape and strides");
  dots.a.column_stride = INT64_MAX, refused("a: shape and strides");
  dots.b.row_stride = -8, refused("b: strides");
  dots.b.dtype = DType::kBool, refused("b: dtype");
  dots.valid.size = 5, refused("valid");
  dots.valid.dtype = DType::kFloat32, refused("valid: dtype");
  dots.offset.dtype = DType::kFloat64, refused("offset: dtype");
  dots.offset.size = 7, refused("offset");
  dots.parts.size = 7, refused("parts");
  dots.parts.data = dots.scores.data, refused("parts: must not overlap scores");
  dots.parts.data = dots.offset.data, refused("parts: must not overlap offset");
  const auto end = [](const auto& input) {
    return static_cast<char*>(const_cast<void*>(input.data)) + input.num_bytes - 8;
  };
  dots.scores.data = end(dots.a), refused("scores: must not overlap a");
  dots.scores.data = end(dots.b), refused("scores: must not overlap b");
  dots.valid.data = end(dots.scores), refused("scores: must not overlap valid");
}

}  // namespace
}  // namespace citi

int main() {
  citi::CheckValues();
  citi::CheckThreads();
  citi::CheckFloatScores();
  citi::CheckEveryHalf();
  citi::CheckNan();
  citi::CheckArguments();
  return citi::Report();
}
