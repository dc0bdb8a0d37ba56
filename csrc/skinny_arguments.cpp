#include "skinny_arguments.h"

#include <initializer_list>
#include <utility>

namespace citi {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 40;
constexpr int64_t kMaxParts = 4096;

bool Is16Bit(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16; }

std::string First(std::initializer_list<std::string> problems) {
  for (const std::string& problem : problems) {
    if (!problem.empty()) return problem;
  }
  return "";
}

// size: entries, as a product that may not fit.
std::string InvalidProduct(const std::string& name, std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) {
    if (size > 0 && product > kMaxElements / size) return name + ": too many entries";
    product *= size;
  }
  return "";
}

std::string InvalidTensor(const std::string& name, const Vector& vector, DType dtype,
                          std::initializer_list<int64_t> sizes) {
  const std::string problem = InvalidProduct(name, sizes);
  if (!problem.empty()) return problem;
  if (vector.data == nullptr) return name + ": data must not be null";
  if (vector.dtype != dtype) {
    return name + (dtype == DType::kFloat32 ? ": dtype must be fp32" : ": dtype must be that of ") +
           (dtype == DType::kFloat32 ? "" : "the others, bf16 or fp16");
  }
  if (reinterpret_cast<uintptr_t>(vector.data) % 16 != 0) {
    return name + ": data must be aligned to 16 bytes";
  }
  int64_t size = 1;
  for (const int64_t each : sizes) size *= each;
  return InvalidVector(name, vector, size);
}

// Rows that cp.async can read, 16 bytes at a time.
std::string InvalidRows(const std::string& name, const Matrix& matrix, int64_t num_rows,
                        int64_t num_columns) {
  if (!Is16Bit(matrix.dtype)) return name + ": dtype must be bf16 or fp16";
  if (num_columns % 8 != 0) return name + ": columns must be a multiple of 8";
  if (matrix.column_stride != 1) return name + ": columns must be contiguous";
  if (matrix.row_stride % 8 != 0 || reinterpret_cast<uintptr_t>(matrix.data) % 16 != 0) {
    return name + ": rows must be aligned to 16 bytes";
  }
  return InvalidMatrix(name, matrix, num_rows, num_columns);
}

std::string InvalidCount(const std::string& name, int64_t count, int64_t most) {
  if (count >= 1 && count <= most) return "";
  return name + ": must be in [1, " + std::to_string(most) + "], got " + std::to_string(count);
}

// 32-bit numbers that the GPU counts in; null: left out. size: 0 where any will do.
std::string InvalidNumbers(const std::string& name, const Indices& numbers, int64_t size) {
  if (numbers.data == nullptr) return "";
  if (reinterpret_cast<uintptr_t>(numbers.data) % sizeof(int32_t) != 0) {
    return name + ": data must be aligned to its dtype";
  }
  if (size != 0 && numbers.size != size) {
    return name + ": must have " + std::to_string(size) + " entries, got " +
           std::to_string(numbers.size);
  }
  const int64_t most = numbers.num_bytes / int64_t{sizeof(int32_t)};
  if (numbers.size < 1 || numbers.size > most) {
    return name + ": must stay within the " + std::to_string(numbers.num_bytes) +
           " bytes of its storage";
  }
  return "";
}

}  // namespace

std::string InvalidSize(const std::string& name, int64_t size, int64_t most) {
  return InvalidCount(name, size, most);
}

std::string Invalid(const RankShape& shape) {
  std::string problem = First({InvalidCount("num_tokens", shape.num_tokens, kMaxSize),
                               InvalidCount("num_experts", shape.num_experts, kMaxSkinnyGates - 1),
                               InvalidCount("expert_rank", shape.expert_rank, kMaxSkinnyRanks)});
  if (problem.empty() && shape.num_ranks() > kMaxSkinnyRanks) {
    problem = "shape: num_experts * expert_rank must be at most " +
              std::to_string(kMaxSkinnyRanks) + ", got " + std::to_string(shape.num_ranks());
  }
  return problem;
}

std::string Invalid(const PackArguments& s) {
  std::string problem = First({InvalidCount("num_rows", s.num_rows, kMaxSize),
                               InvalidCount("num_columns", s.num_columns, kMaxSize),
                               InvalidCount("sources", static_cast<int64_t>(s.sources.size()), 2)});
  if (problem.empty() && s.num_columns % 8 != 0) problem = "num_columns: must be a multiple of 8";
  if (!problem.empty()) return problem;
  if (!Is16Bit(s.out.dtype)) return "out: dtype must be bf16 or fp16";
  problem = InvalidTensor("out", s.out, s.out.dtype, {s.num_rows, s.num_columns});
  std::vector<Named> tensors = {{"out", s.out}};
  for (const PackedMatrix& each : s.sources) {
    if (!problem.empty()) return problem;
    if (each.matrix.dtype != DType::kFloat32 && !Is16Bit(each.matrix.dtype)) {
      return "sources: dtype must be fp32, bf16 or fp16";
    }
    if (each.first_row < 0 || each.num_rows < 1 || each.num_columns < 1 ||
        each.first_row > s.num_rows || each.num_rows > s.num_rows - each.first_row ||
        each.num_columns > s.num_columns) {
      return "sources: must lie within the rows and columns of out";
    }
    problem = InvalidMatrix("sources", each.matrix, each.num_rows, each.num_columns);
    tensors.push_back({"sources", ExtentOf(each.matrix, each.num_rows, each.num_columns)});
  }
  if (problem.empty()) problem = InvalidNumbers("zeros", s.zeros, 0);
  if (!problem.empty()) return problem;
  tensors.insert(tensors.begin(), {"zeros", ExtentOf(s.zeros)});
  return InvalidOverlap(tensors, 2);
}

std::string Invalid(const ShrinkArguments& s, int64_t num_splits) {
  std::string problem = First({Invalid(s.shape), InvalidCount("num_inputs", s.num_inputs, kMaxSize),
                               InvalidDropout(s.dropout)});
  if (!problem.empty()) return problem;
  const auto [num_tokens, num_experts, expert_rank] = s.shape;
  if (s.top_k < 0 || s.top_k > num_experts) {
    return "top_k: must be in [0, " + std::to_string(num_experts) + "], got " +
           std::to_string(s.top_k);
  }
  problem =
      First({InvalidRows("x", s.x, num_tokens, s.num_inputs),
             InvalidTensor("stack", s.stack, s.x.dtype, {s.shape.num_rows(), s.num_inputs}),
             InvalidTensor("h", s.h, s.x.dtype, {num_tokens, s.shape.num_ranks()}),
             InvalidTensor("u", s.u, s.x.dtype, {num_tokens, s.shape.padded_ranks()}),
             InvalidTensor("probs", s.probs, DType::kFloat32, {num_tokens, s.shape.num_gates()})});
  if (problem.empty() && num_splits > 1) {
    problem = InvalidTensor("parts", s.parts, DType::kFloat32,
                            {num_splits, num_tokens, s.shape.num_rows()});
  }
  if (!problem.empty()) return problem;
  return InvalidOverlap({{"h", s.h},
                         {"u", s.u},
                         {"probs", s.probs},
                         {"parts", s.parts},
                         {"x", ExtentOf(s.x, num_tokens, s.num_inputs)},
                         {"stack", s.stack}},
                        4);
}

std::string Invalid(const RowProductArguments& s, int64_t num_splits) {
  std::string problem = First({InvalidCount("num_tokens", s.num_tokens, kMaxSize),
                               InvalidCount("num_columns", s.num_columns, kMaxSize),
                               InvalidCount("num_rows", s.num_rows, kMaxSkinnyRanks)});
  if (problem.empty() && s.num_rows % 8 != 0) problem = "num_rows: must be a multiple of 8";
  if (!problem.empty()) return problem;
  problem = First(
      {InvalidRows("wide", s.wide, s.num_tokens, s.num_columns),
       InvalidTensor("rows", s.rows, s.wide.dtype, {s.num_rows, s.num_columns}),
       InvalidTensor("parts", s.parts, DType::kFloat32, {num_splits, s.num_tokens, s.num_rows})});
  if (!problem.empty()) return problem;
  return InvalidOverlap({{"parts", s.parts},
                         {"wide", ExtentOf(s.wide, s.num_tokens, s.num_columns)},
                         {"rows", s.rows}},
                        1);
}

std::string Invalid(const FactorArguments& s, int64_t num_tiles, int64_t num_shares) {
  const int64_t most = kMaxSkinnyRanks + kMaxSkinnyGates;
  std::string problem = First({InvalidCount("num_tokens", s.num_tokens, kMaxSize),
                               InvalidCount("num_columns", s.num_columns, kMaxSize),
                               InvalidCount("num_narrow", s.num_narrow, most),
                               InvalidCount("rank_columns", s.rank_columns + 1, most + 1),
                               InvalidDropout(s.dropout)});
  if (problem.empty() && s.num_narrow % 8 != 0) problem = "num_narrow: must be a multiple of 8";
  if (problem.empty() && s.rank_columns % 8 != 0) problem = "rank_columns: must be a multiple of 8";
  if (!problem.empty()) return problem;
  problem = First({InvalidRows("wide", s.wide, s.num_tokens, s.num_columns),
                   InvalidRows("narrow", s.narrow, s.num_tokens, s.num_narrow)});
  if (problem.empty() && s.narrow.dtype != s.wide.dtype) problem = "narrow: dtype must be wide's";
  if (problem.empty()) {
    problem =
        InvalidTensor("parts", s.parts, DType::kFloat32, {num_shares, s.num_columns, s.num_narrow});
  }
  if (problem.empty() && s.num_ranks != 0) {
    if (s.dropout) return "dropout: b must be left out with it";
    if (s.num_ranks < 0 || Padded(s.num_ranks) != s.num_narrow) {
      return "num_ranks: must be num_narrow but for padding, got " + std::to_string(s.num_ranks);
    }
    problem = First(
        {InvalidTensor("b", s.b, s.wide.dtype, {s.num_columns, s.num_ranks}),
         InvalidTensor("du", s.du, DType::kFloat32, {num_tiles, s.num_tokens, s.num_narrow})});
  }
  if (problem.empty() && s.counts.data != nullptr && s.done.data == nullptr) {
    return "counts: come with done";
  }
  if (problem.empty()) {
    problem = First({InvalidNumbers("counts", s.counts, 0),
                     InvalidNumbers("done", s.done, num_tiles * num_shares)});
  }
  if (!problem.empty()) return problem;
  return InvalidOverlap({{"parts", s.parts},
                         {"du", s.du},
                         {"done", ExtentOf(s.done)},
                         {"counts", ExtentOf(s.counts)},
                         {"b", s.b},
                         {"wide", ExtentOf(s.wide, s.num_tokens, s.num_columns)},
                         {"narrow", ExtentOf(s.narrow, s.num_tokens, s.num_narrow)}},
                        3);
}

std::string Invalid(const ScaleArguments& s) {
  std::string problem = Invalid(s.shape);
  if (!problem.empty()) return problem;
  if (!Is16Bit(s.h.dtype)) return "h: dtype must be bf16 or fp16";
  const int64_t num_tokens = s.shape.num_tokens;
  problem =
      First({InvalidTensor("h", s.h, s.h.dtype, {num_tokens, s.shape.num_ranks()}),
             InvalidTensor("probs", s.probs, DType::kFloat32, {num_tokens, s.shape.num_gates()}),
             InvalidTensor("u", s.u, s.h.dtype, {num_tokens, s.shape.padded_ranks()})});
  if (!problem.empty()) return problem;
  return InvalidOverlap({{"u", s.u}, {"h", s.h}, {"probs", s.probs}}, 1);
}

std::string Invalid(const RankArguments& s) {
  std::string problem = Invalid(s.shape);
  if (!problem.empty()) return problem;
  if (!Is16Bit(s.h.dtype)) return "h: dtype must be bf16 or fp16";
  const int64_t num_tokens = s.shape.num_tokens, num_gates = s.shape.num_gates();
  problem = First({InvalidTensor("h", s.h, s.h.dtype, {num_tokens, s.shape.num_ranks()}),
                   InvalidTensor("probs", s.probs, DType::kFloat32, {num_tokens, num_gates}),
                   InvalidTensor("dz", s.dz, s.h.dtype, {num_tokens, s.shape.num_rows()})});
  if (problem.empty() && s.du.data != nullptr) {
    problem = First({InvalidCount("num_parts", s.num_parts, kMaxSize),
                     InvalidTensor("du", s.du, DType::kFloat32,
                                   {s.num_parts, num_tokens, s.shape.padded_ranks()})});
  }
  if (problem.empty() && s.dgate.data != nullptr) {
    problem = InvalidTensor("dgate", s.dgate, DType::kFloat32, {num_tokens, num_gates});
  }
  if (!problem.empty()) return problem;
  return InvalidOverlap(
      {{"dz", s.dz}, {"du", s.du}, {"h", s.h}, {"probs", s.probs}, {"dgate", s.dgate}}, 1);
}

std::string Invalid(const SumArguments& s) {
  std::string problem = First({InvalidCount("num_parts", s.num_parts, kMaxParts),
                               InvalidCount("num_rows", s.num_rows, kMaxSize),
                               InvalidCount("num_columns", s.num_columns, 1024),
                               InvalidCount("outputs", static_cast<int64_t>(s.outputs.size()), 2)});
  if (!problem.empty()) return problem;
  problem =
      InvalidTensor("parts", s.parts, DType::kFloat32, {s.num_parts, s.num_rows, s.num_columns});
  std::vector<Named> tensors;
  for (const SumOutput& each : s.outputs) {
    if (!problem.empty()) return problem;
    if (each.out.dtype != DType::kFloat32 && !Is16Bit(each.out.dtype)) {
      return "outputs: dtype must be fp32, bf16 or fp16";
    }
    if (each.first < 0 || each.count < 1 || each.first > s.num_columns ||
        each.count > s.num_columns - each.first) {
      return "outputs: columns must lie within the " + std::to_string(s.num_columns) +
             " of the parts";
    }
    problem = InvalidVector("outputs", each.out, s.num_rows * each.count);
    tensors.push_back({"outputs", each.out});
  }
  tensors.push_back({"parts", s.parts});
  return problem.empty() ? InvalidOverlap(tensors, s.outputs.size()) : problem;
}

std::string Invalid(const InputUpdateArguments& s) {
  std::string problem = First({Invalid(s.shape), InvalidCount("num_inputs", s.num_inputs, kMaxSize),
                               InvalidDropout(s.dropout)});
  if (!problem.empty()) return problem;
  const int64_t num_tokens = s.shape.num_tokens, num_rows = s.shape.num_rows();
  problem = First({InvalidRows("dx", s.dx, num_tokens, s.num_inputs),
                   InvalidTensor("dz", s.dz, s.dx.dtype, {num_tokens, num_rows}),
                   InvalidTensor("stack", s.stack, s.dx.dtype, {num_rows, s.num_inputs})});
  if (problem.empty() && num_tokens > 1 && s.dx.row_stride < s.num_inputs) {
    problem = "dx: rows must not overlap";
  }
  if (!problem.empty()) return problem;
  return InvalidOverlap(
      {{"dx", ExtentOf(s.dx, num_tokens, s.num_inputs)}, {"dz", s.dz}, {"stack", s.stack}}, 1);
}

std::string Invalid(const NonFiniteArguments& s) {
  std::string problem = First(
      {Invalid(s.shape), InvalidCount("num_columns", s.num_columns, kMaxSize),
       InvalidProduct("out", {s.shape.num_tokens, s.num_columns}), InvalidDropout(s.dropout)});
  if (!problem.empty()) return problem;
  const int64_t num_tokens = s.shape.num_tokens, num_ranks = s.shape.num_ranks();
  if (!Is16Bit(s.out.dtype)) return "out: dtype must be bf16 or fp16";
  if (s.left.dtype != s.out.dtype) return "left: dtype must be out's";
  if (s.right.dtype != s.out.dtype) return "right: dtype must be out's";
  if (s.left.column_stride != 1) return "left: columns must be contiguous";
  problem =
      First({InvalidVector("out", s.out, num_tokens * s.num_columns),
             InvalidMatrix("left", s.left, num_tokens, num_ranks),
             InvalidMatrix("right", s.right, num_ranks, s.num_columns),
             InvalidTensor("probs", s.probs, DType::kFloat32, {num_tokens, s.shape.num_gates()})});
  if (!problem.empty()) return problem;
  return InvalidOverlap({{"out", s.out},
                         {"left", ExtentOf(s.left, num_tokens, num_ranks)},
                         {"right", ExtentOf(s.right, num_ranks, s.num_columns)},
                         {"probs", s.probs}},
                        1);
}

}  // namespace citi
