#include "molora_arguments.h"

#include <initializer_list>
#include <utility>

namespace citi {
namespace {

// So that no product of sizes overflows.
constexpr int64_t kMaxSize = int64_t{1} << 40;

bool IsTaken(DType dtype) { return dtype == DType::kFloat32 || dtype == DType::kBFloat16; }

// Checks one argument after the other until the first that is wrong.
class Checker {
 public:
  explicit Checker(const MoloraSizes& sizes) : problem_(Invalid(sizes)) {
    tensors_.reserve(16);  // more than a problem has arguments
  }

  void CheckInput(const char* name, const Matrix& matrix, int64_t num_rows, int64_t num_columns) {
    if (!CheckMatrix(name, matrix, num_rows, num_columns)) return;
    tensors_.push_back({name, ExtentOf(matrix, num_rows, num_columns)});
  }
  void CheckInput(const char* name, const Vector& vector, int64_t size) {
    if (CheckVector(name, vector, size)) tensors_.push_back({name, vector});
  }
  // Rows that lie apart, so that two threads never write to one element.
  void CheckOutput(const char* name, const Matrix& matrix, int64_t num_rows, int64_t num_columns) {
    if (!CheckMatrix(name, matrix, num_rows, num_columns)) return;
    if (num_rows == 0 || num_columns == 0) return;
    if ((matrix.column_stride != 1 && num_columns > 1) ||
        (matrix.row_stride < num_columns && num_rows > 1)) {
      problem_ = std::string(name) + ": rows must be contiguous and lie apart";
      return;
    }
    KeepOutput({name, ExtentOf(matrix, num_rows, num_columns)});
  }
  void CheckOutput(const char* name, const Vector& vector, int64_t size) {
    if (CheckVector(name, vector, size)) KeepOutput({name, vector});
  }
  void CheckDType(const char* name, DType dtype, DType wanted) {
    if (problem_.empty() && dtype != wanted) {
      problem_ = std::string(name) + ": dtype must be " +
                 (wanted == DType::kFloat32 ? "fp32" : "bf16") + " here";
    }
  }
  void CheckTaken(const char* name, DType dtype) {
    if (problem_.empty() && !IsTaken(dtype)) {
      problem_ = std::string(name) + ": dtype must be fp32 or bf16";
    }
  }
  void Refuse(const std::string& problem) {
    if (problem_.empty()) problem_ = problem;
  }
  void Require(bool holds, const char* otherwise) {
    if (problem_.empty() && !holds) problem_ = otherwise;
  }
  bool IsFine() const { return problem_.empty(); }
  std::string Problem() const {
    return problem_.empty() ? InvalidOverlap(tensors_, num_outputs_) : problem_;
  }

 private:
  bool CheckMatrix(const char* name, const Matrix& matrix, int64_t num_rows, int64_t num_columns) {
    CheckTaken(name, matrix.dtype);
    if (problem_.empty()) problem_ = InvalidMatrix(name, matrix, num_rows, num_columns);
    return problem_.empty();
  }
  bool CheckVector(const char* name, const Vector& vector, int64_t size) {
    CheckTaken(name, vector.dtype);
    if (problem_.empty()) problem_ = InvalidVector(name, vector, size);
    return problem_.empty();
  }

  void KeepOutput(const Named& output) {
    tensors_.insert(tensors_.begin() + static_cast<int64_t>(num_outputs_++), output);
  }

  std::string problem_;
  std::vector<Named> tensors_;  // outputs first
  size_t num_outputs_ = 0;
};

void CheckAdapter(const MoloraSizes& sizes, const Matrix& a, const Matrix& b, const Matrix& router,
                  Checker* checker) {
  checker->CheckInput("a", a, sizes.stacked_rank, sizes.num_in);
  checker->CheckInput("b", b, sizes.num_out, sizes.stacked_rank);
  checker->CheckInput("router", router, sizes.num_gates(), sizes.num_in);
}

bool HasContiguousRows(const Matrix& matrix, int64_t num_columns) {
  return matrix.column_stride == 1 || num_columns <= 1;
}

// The linear layer, where the kernel computes it too.
void CheckBase(const MoloraForward& forward, Checker* checker) {
  const MoloraSizes& sizes = forward.sizes;
  const bool has_weight = forward.weight.data != nullptr;
  if (has_weight) {
    checker->Require(forward.is_of_few(), "weight: must be left out of many tokens and of dropout");
    checker->Require(!forward.has_base, "weight: must be left out where y is added to");
    checker->CheckDType("weight", forward.weight.dtype, forward.x.dtype);
    checker->CheckInput("weight", forward.weight, sizes.num_out, sizes.num_in);
    checker->Require(HasContiguousRows(forward.weight, sizes.num_in),
                     "weight: rows must be contiguous");
    checker->Require(HasContiguousRows(forward.x, sizes.num_in),
                     "x: rows must be contiguous where weight is given");
  }
  if (forward.bias.data != nullptr) {
    checker->Require(has_weight, "bias: must be left out where weight is");
    checker->CheckDType("bias", forward.bias.dtype, forward.x.dtype);
    checker->CheckInput("bias", forward.bias, sizes.num_out);
  }
}

}  // namespace

std::string Invalid(const MoloraSizes& sizes) {
  for (const auto& [name, size] :
       {std::pair{"num_tokens", sizes.num_tokens}, std::pair{"num_in", sizes.num_in},
        std::pair{"num_out", sizes.num_out}}) {
    if (size < 0 || size > kMaxSize) {
      return std::string("shape: ") + name + " must be in [0, 2^40], got " + std::to_string(size);
    }
  }
  if (sizes.stacked_rank < 1 || sizes.stacked_rank > kMaxStackedRank) {
    return "shape: stacked_rank must be in [1, " + std::to_string(kMaxStackedRank) + "], got " +
           std::to_string(sizes.stacked_rank);
  }
  if (sizes.num_experts < 1 || sizes.stacked_rank % sizes.num_experts != 0) {
    return "shape: num_experts must divide the stacked rank " + std::to_string(sizes.stacked_rank) +
           ", got " + std::to_string(sizes.num_experts);
  }
  return "";
}

std::string InvalidFactors(const MoloraSizes& sizes, const Matrix* a, const Matrix* b) {
  Checker checker(sizes);
  if (a != nullptr) checker.CheckInput("a", *a, sizes.stacked_rank, sizes.num_in);
  if (b != nullptr) checker.CheckInput("b", *b, sizes.num_out, sizes.stacked_rank);
  return checker.Problem();
}

std::string Invalid(const MoloraForward& forward, int64_t workspace_size) {
  const MoloraSizes& sizes = forward.sizes;
  Checker checker(sizes);
  const DType dtype = forward.x.dtype;
  if (!checker.IsFine()) return checker.Problem();
  checker.Refuse(InvalidDropout(forward.dropout));
  if (forward.top_k < 0 || forward.top_k > sizes.num_experts) {
    checker.Refuse("top_k: must be in [0, " + std::to_string(sizes.num_experts) + "], got " +
                   std::to_string(forward.top_k));
  }
  checker.CheckInput("x", forward.x, sizes.num_tokens, sizes.num_in);
  CheckAdapter(sizes, forward.a, forward.b, forward.router, &checker);
  checker.CheckDType("y", forward.y.dtype, dtype);
  checker.CheckOutput("y", forward.y, sizes.num_tokens, sizes.num_out);
  CheckBase(forward, &checker);
  if (forward.h.data != nullptr) {
    checker.CheckDType("h", forward.h.dtype, dtype);
    checker.CheckOutput("h", forward.h, sizes.num_tokens * sizes.stacked_rank);
  }
  if (forward.probs.data != nullptr) {
    checker.CheckDType("probs", forward.probs.dtype, DType::kFloat32);
    checker.CheckOutput("probs", forward.probs, sizes.num_tokens * sizes.num_gates());
  }
  if (workspace_size > 0) {
    checker.CheckDType("workspace", forward.workspace.dtype, DType::kFloat32);
    checker.CheckOutput("workspace", forward.workspace, workspace_size);
  }
  return checker.Problem();
}

std::string Invalid(const MoloraBackward& backward, int64_t workspace_size) {
  const MoloraSizes& sizes = backward.sizes;
  Checker checker(sizes);
  const DType dtype = backward.h.dtype;
  if (!checker.IsFine()) return checker.Problem();
  checker.Refuse(InvalidDropout(backward.dropout));
  checker.CheckInput("h", backward.h, sizes.num_tokens * sizes.stacked_rank);
  checker.CheckDType("probs", backward.probs.dtype, DType::kFloat32);
  checker.CheckInput("probs", backward.probs, sizes.num_tokens * sizes.num_gates());
  if (backward.dy.data != nullptr) {
    checker.CheckDType("dy", backward.dy.dtype, dtype);
    checker.CheckInput("dy", backward.dy, sizes.num_tokens, sizes.num_out);
  }
  if (backward.x.data != nullptr) {
    checker.CheckDType("x", backward.x.dtype, dtype);
    checker.CheckInput("x", backward.x, sizes.num_tokens, sizes.num_in);
  }
  CheckAdapter(sizes, backward.a, backward.b, backward.router, &checker);
  if (backward.dgate.data != nullptr) {
    checker.CheckDType("dgate", backward.dgate.dtype, DType::kFloat32);
    checker.CheckInput("dgate", backward.dgate, sizes.num_tokens * sizes.num_gates());
  }
  if (backward.dx.data != nullptr) {
    checker.CheckDType("dx", backward.dx.dtype, dtype);
    checker.CheckOutput("dx", backward.dx, sizes.num_tokens, sizes.num_in);
  }
  const auto check_gradient = [&](const char* name, const Vector& gradient, int64_t size) {
    if (gradient.data != nullptr) checker.CheckOutput(name, gradient, size);
  };
  check_gradient("da", backward.da, sizes.stacked_rank * sizes.num_in);
  check_gradient("db", backward.db, sizes.num_out * sizes.stacked_rank);
  check_gradient("drouter", backward.drouter, sizes.num_gates() * sizes.num_in);
  const bool is_empty = sizes.num_tokens == 0;
  checker.Require(backward.db.data == nullptr || backward.dy.data != nullptr || is_empty,
                  "dy: must be given where db is asked for");
  const bool needs_x = backward.da.data != nullptr || backward.drouter.data != nullptr;
  checker.Require(!needs_x || backward.x.data != nullptr || is_empty,
                  "x: must be given where da or drouter is asked for");
  checker.CheckDType("workspace", backward.workspace.dtype, DType::kFloat32);
  checker.CheckOutput("workspace", backward.workspace, workspace_size);
  return checker.Problem();
}

}  // namespace citi
