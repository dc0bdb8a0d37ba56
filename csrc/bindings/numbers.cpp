#include "bindings/numbers.h"

namespace citi {
namespace {

constexpr int64_t kMaxThreads = 4096;

}  // namespace

void Refuse(const std::string& problem) { throw pybind11::value_error(problem); }

DType AsDType(const char* name, int32_t code) {
  const DType dtype = static_cast<DType>(code);
  if (!IsKnown(dtype)) {
    Refuse(std::string(name) + ": dtype must be one of DTYPES, got " + std::to_string(code));
  }
  return dtype;
}

Matrix AsMatrix(const char* name, const MatrixNumbers& numbers) {
  const auto& [data, num_bytes, dtype, row_stride, column_stride] = numbers;
  return {reinterpret_cast<const void*>(data), num_bytes, AsDType(name, dtype), row_stride,
          column_stride};
}

Matrix AsMatrix(const char* name, const std::optional<MatrixNumbers>& numbers) {
  if (!numbers) return {nullptr, 0, DType::kBool, 0, 0};
  return AsMatrix(name, *numbers);
}

Vector AsVector(const char* name, const VectorNumbers& numbers) {
  const auto& [data, num_bytes, dtype, size] = numbers;
  return {reinterpret_cast<void*>(data), num_bytes, AsDType(name, dtype), size};
}

Vector AsVector(const char* name, const std::optional<VectorNumbers>& numbers) {
  if (!numbers) return {nullptr, 0, DType::kBool, 0};
  const Vector vector = AsVector(name, *numbers);
  if (vector.data == nullptr && vector.size != 0)
    Refuse(std::string(name) + ": data must not be null");
  return vector;
}

Indices AsIndices(const std::optional<IndexNumbers>& numbers) {
  if (!numbers) return {};
  const auto& [data, num_bytes, size] = *numbers;
  return {reinterpret_cast<const int32_t*>(data), num_bytes, size};
}

Dropout AsDropout(const DropoutNumbers& numbers) {
  const auto& [seed_low, seed_high, threshold, inverse_keep] = numbers;
  return {seed_low, seed_high, threshold, inverse_keep};
}

std::optional<Dropout> AsDropout(const std::optional<DropoutNumbers>& numbers) {
  return numbers ? std::optional(AsDropout(*numbers)) : std::nullopt;
}

void CheckThreads(int64_t num_threads) {
  if (num_threads < 1 || num_threads > kMaxThreads) {
    Refuse("num_threads: must be in [1, 4096], got " + std::to_string(num_threads));
  }
}

}  // namespace citi
