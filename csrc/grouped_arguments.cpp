#include "grouped_arguments.h"

#include <initializer_list>
#include <utility>

namespace citi {
namespace {

// Indices of slots and columns fit 32 bits.
constexpr int64_t kMaxSize = INT32_MAX;

std::string InvalidSizes(const std::initializer_list<std::pair<const char*, int64_t>>& sizes) {
  for (const auto& [name, size] : sizes) {
    if (size < 1 || size > kMaxSize) {
      return std::string(name) + ": must be in [1, 2^31), got " + std::to_string(size);
    }
  }
  return "";
}

std::string InvalidIndices(const std::string& name, const Indices& indices, int64_t size) {
  return InvalidVector(name, ExtentOf(indices), size);
}

std::string InvalidRouting(const Routing& routing) {
  std::string problem = InvalidSizes({{"num_tokens", routing.num_tokens},
                                      {"num_experts", routing.num_experts},
                                      {"top_k", routing.top_k}});
  if (!problem.empty()) return problem;
  if (routing.top_k > routing.num_experts) return "top_k: must not exceed the experts";
  if (routing.num_slots() > kMaxSize || routing.num_experts * routing.top_k >= kMaxSize) {
    return "top_k: too many slots or pairs, got " + std::to_string(routing.top_k);
  }
  problem = InvalidIndices("order", routing.order, routing.num_slots());
  if (!problem.empty()) return problem;
  return InvalidIndices("offsets", routing.offsets, routing.num_experts * routing.top_k + 1);
}

// Of a matrix whose rows are contiguous.
std::string InvalidContiguous(const std::string& name, const Matrix& matrix, int64_t num_rows,
                              int64_t num_columns) {
  const std::string problem = InvalidMatrix(name, matrix, num_rows, num_columns);
  if (!problem.empty()) return problem;
  if (matrix.column_stride != 1 && num_columns > 1) {
    return name + ": column stride must be 1, got " + std::to_string(matrix.column_stride);
  }
  return "";
}

std::string InvalidInput(const std::string& name, const Matrix& matrix, DType dtype,
                         int64_t num_rows, int64_t num_columns) {
  if (dtype != DType::kBFloat16 && dtype != DType::kFloat16) {
    return name + ": dtype must be bf16 or fp16";
  }
  if (matrix.dtype != dtype) return name + ": dtype must be that of the other inputs";
  return InvalidContiguous(name, matrix, num_rows, num_columns);
}

std::string InvalidOutput(const Matrix& out, DType dtype, int64_t num_rows, int64_t num_columns) {
  if (out.dtype != dtype && out.dtype != DType::kFloat32) {
    return "out: dtype must be that of the inputs or fp32";
  }
  std::string problem = InvalidContiguous("out", out, num_rows, num_columns);
  if (problem.empty() && num_rows > 1 && out.row_stride < num_columns) {
    problem = "out: rows must not overlap";
  }
  return problem;
}

int64_t NumRows(const Routing& routing, const Rows& rows) {
  return rows.are_slots ? routing.num_slots() : routing.num_tokens;
}

struct Shape {
  int64_t num_rows, num_columns;
};

// Of all experts together, (rows, columns) each.
Shape Stacked(const Routing& routing, int64_t rows, int64_t columns, bool experts_in_rows) {
  if (experts_in_rows) return {routing.num_experts * rows, columns};
  return {rows, routing.num_experts * columns};
}

Shape WeightShape(const GroupedProduct& p) {
  const int64_t rows = p.weight_is_out_in ? p.num_out : p.num_in;
  const int64_t columns = p.weight_is_out_in ? p.num_in : p.num_out;
  return Stacked(p.routing, rows, columns, p.experts_in_rows);
}

std::string InvalidChoices(const GroupedProduct& p) {
  if (p.first_choice < 0 || p.first_choice >= p.end_choice || p.end_choice > p.routing.top_k) {
    return "choices: must be a range within the " + std::to_string(p.routing.top_k) + ", got " +
           std::to_string(p.first_choice) + " to " + std::to_string(p.end_choice);
  }
  if (!p.out.are_slots && p.end_choice - p.first_choice > 1) {
    return "choices: must be one where a row of out is that of a token";
  }
  return "";
}

std::string InvalidOptionals(const GroupedProduct& p, int64_t num_tiles) {
  std::string problem;
  if (p.gates.data != nullptr) {
    if (p.gates.dtype != DType::kFloat32) return "gates: dtype must be fp32";
    problem = InvalidContiguous("gates", p.gates, p.routing.num_tokens, p.routing.num_experts + 1);
  }
  if (!problem.empty()) return problem;
  if ((p.factors.data == nullptr) != (p.dots.data == nullptr)) {
    return "dots: come with factors, and factors with dots";
  }
  if (p.dots.data == nullptr) return "";
  problem =
      InvalidInput("factors", p.factors, p.rows.matrix.dtype, p.routing.num_slots(), p.num_out);
  if (!problem.empty()) return problem;
  if (p.dots.dtype != DType::kFloat32) return "dots: dtype must be fp32";
  return InvalidVector("dots", p.dots, num_tiles * p.routing.num_slots());
}

std::string Overlapping(const GroupedProduct& p) {
  const Shape weight = WeightShape(p);
  const Routing& routing = p.routing;
  return InvalidOverlap({{"out", ExtentOf(p.out.matrix, NumRows(routing, p.out), p.num_out)},
                         {"dots", p.dots},
                         {"rows", ExtentOf(p.rows.matrix, NumRows(routing, p.rows), p.num_in)},
                         {"weight", ExtentOf(p.weight, weight.num_rows, weight.num_columns)},
                         {"gates", ExtentOf(p.gates, routing.num_tokens, routing.num_experts + 1)},
                         {"factors", ExtentOf(p.factors, routing.num_slots(), p.num_out)},
                         {"order", ExtentOf(routing.order)},
                         {"offsets", ExtentOf(routing.offsets)}},
                        2);
}

}  // namespace

std::string Invalid(const GroupedProduct& p, int64_t num_tiles) {
  std::string problem = InvalidSizes({{"num_in", p.num_in}, {"num_out", p.num_out}});
  if (problem.empty()) problem = InvalidRouting(p.routing);
  if (problem.empty()) problem = InvalidChoices(p);
  if (!problem.empty()) return problem;
  const DType dtype = p.rows.matrix.dtype;
  const Shape weight = WeightShape(p);
  problem = InvalidInput("rows", p.rows.matrix, dtype, NumRows(p.routing, p.rows), p.num_in);
  if (problem.empty()) {
    problem = InvalidInput("weight", p.weight, dtype, weight.num_rows, weight.num_columns);
  }
  if (problem.empty()) {
    problem = InvalidOutput(p.out.matrix, dtype, NumRows(p.routing, p.out), p.num_out);
  }
  if (problem.empty()) problem = InvalidOptionals(p, num_tiles);
  if (problem.empty()) problem = Overlapping(p);
  return problem;
}

std::string Invalid(const GroupedGradient& g) {
  const Routing& routing = g.routing;
  std::string problem = InvalidSizes({{"num_rows", g.num_rows}, {"num_columns", g.num_columns}});
  if (problem.empty()) problem = InvalidRouting(routing);
  if (!problem.empty()) return problem;
  const DType dtype = g.left.matrix.dtype;
  const Shape shape = Stacked(routing, g.num_rows, g.num_columns, g.experts_in_rows);
  problem = InvalidInput("left", g.left.matrix, dtype, NumRows(routing, g.left), g.num_rows);
  if (problem.empty()) {
    problem =
        InvalidInput("right", g.right.matrix, dtype, NumRows(routing, g.right), g.num_columns);
  }
  if (problem.empty()) problem = InvalidOutput(g.out, dtype, shape.num_rows, shape.num_columns);
  if (!problem.empty()) return problem;
  return InvalidOverlap(
      {{"out", ExtentOf(g.out, shape.num_rows, shape.num_columns)},
       {"left", ExtentOf(g.left.matrix, NumRows(routing, g.left), g.num_rows)},
       {"right", ExtentOf(g.right.matrix, NumRows(routing, g.right), g.num_columns)},
       {"order", ExtentOf(routing.order)},
       {"offsets", ExtentOf(routing.offsets)}},
      1);
}

}  // namespace citi
